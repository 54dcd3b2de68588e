// Products of rows with matrices in F16.
#include "product_few.cuh"

PRODUCTS(product_f16, FORMAT_F16)
PRODUCTS_OF_FEW(product_f16, FORMAT_F16)
