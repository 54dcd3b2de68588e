// Products of factors in f32, each the sum of two numbers of 11 bits: of their four products the three that matter.
#include "train_product.cuh"

PRODUCTS(train_product_f32, ARITHMETIC_F32)
