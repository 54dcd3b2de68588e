// Products of rows with matrices in BF16.
#include "product_few.cuh"

PRODUCTS(product_bf16, FORMAT_BF16)
PRODUCTS_OF_FEW(product_bf16, FORMAT_BF16)
