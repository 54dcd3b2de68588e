// Products of rows with matrices in Q8_0.
#include "product.cuh"

PRODUCTS(product_q8_0, FORMAT_Q8_0)
