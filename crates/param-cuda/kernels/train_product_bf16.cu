// Products of factors in bf16.
#include "train_product.cuh"

PRODUCTS(train_product_bf16, ARITHMETIC_BF16)
