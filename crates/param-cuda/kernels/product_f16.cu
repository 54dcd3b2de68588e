// Products of rows with matrices in F16.
#include "product.cuh"

PRODUCTS(product_f16, FORMAT_F16)
