// Products of rows with matrices in Q6_K.
#include "product.cuh"

PRODUCTS(product_q6_k, FORMAT_Q6_K)
