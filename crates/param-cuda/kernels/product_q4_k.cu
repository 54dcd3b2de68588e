// Products of rows with matrices in Q4_K.
#include "product.cuh"

PRODUCTS(product_q4_k, FORMAT_Q4_K)
