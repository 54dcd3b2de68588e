// Products of rows with matrices in Q4_K.
#include "product_few.cuh"

PRODUCTS(product_q4_k, FORMAT_Q4_K)
PRODUCTS_OF_FEW(product_q4_k, FORMAT_Q4_K)
EXPAND(product_q4_k, FORMAT_Q4_K)
