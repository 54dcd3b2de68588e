// Products of rows with matrices in Q6_K.
#include "product_few.cuh"

PRODUCTS(product_q6_k, FORMAT_Q6_K)
PRODUCTS_OF_FEW(product_q6_k, FORMAT_Q6_K)
EXPAND(product_q6_k, FORMAT_Q6_K)
