// Products of rows with matrices in BF16.
#include "product.cuh"

PRODUCTS(product_bf16, FORMAT_BF16)
