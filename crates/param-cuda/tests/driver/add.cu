// A kernel for tests of the host's side alone.
#include "device.cuh"

KERNEL void add(u32* x, u32 n, u32 by) {
    u32 i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i < n) x[i] += by;
}
