// Products of rows with matrices in Q8_0.
#include "product_few.cuh"

PRODUCTS(product_q8_0, FORMAT_Q8_0)
PRODUCTS_OF_FEW(product_q8_0, FORMAT_Q8_0)
EXPAND(product_q8_0, FORMAT_Q8_0)
