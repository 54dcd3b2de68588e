// Products of factors in f32, rounded to 11 bits each.
#include "train_product.cuh"

PRODUCTS(train_product_tf32, ARITHMETIC_TF32)
