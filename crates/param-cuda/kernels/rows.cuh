// What kernels for many rows agree on.
#pragma once
#include "model.cuh"

#define NO_SLOT 0xffffffffu // of a row that only fills up a batch: computed where that is simplest, and written nowhere
#define LEAST -3.0e38f      // below every score that counts

// Type of activations: what a product reads depends on how its matrix is stored.
enum Element { ELEMENT_F32, ELEMENT_F16, ELEMENT_BF16 };
