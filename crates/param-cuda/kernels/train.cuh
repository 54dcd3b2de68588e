// What kernels of training agree on.
#pragma once
#include "device.cuh"

// Type of activations: the same as Element in src/training/view.rs.
enum Stored { STORED_F32, STORED_BF16 };

DEVICE float load_stored(const u8* p, u64 at, u32 stored) { return stored == STORED_F32 ? ((const float*)p)[at] : from_bf16(((const u16*)p)[at]); }
DEVICE void store_stored(u8* p, u64 at, u32 stored, float v) {
    if (stored == STORED_F32) ((float*)p)[at] = v;
    else ((u16*)p)[at] = to_bf16(v);
}

// Whether element `at` of a site is kept, by the bits that dropout.cu drew: bit at % 32 of word at / 32.
DEVICE bool is_kept(const u32* bits, u64 at) { return bits[at / 32] >> (at % 32) & 1; }

enum Gelu { GELU_OF_ERF, GELU_OF_TANH }; // Activation of src/model.rs

// What changes from step to step, in device memory, so that a recorded step can be played again: `Numbers` in src/training/numbers.rs.
struct Numbers {
    u32 key[8];          // of ChaCha, from the run's seed
    u32 pass[2];         // number of this forward pass, low word first
    float target_share;  // of a target's cross-entropy in the loss: one over the targets of all batches of the step
    float batch_share;   // of this batch's router losses in the loss: one over the batches of the step
    float lr, muon_lr;
    float bias1, root2;  // 1 / (1 - beta1^t), 1 / sqrt(1 - beta2^t)
    float clip;          // largest gradient norm
    float most_scale;    // what gradients are multiplied by at most; 0: the step is left out
};

// What a step comes to, in device memory: `Outcome` in src/training/numbers.rs.
struct Outcome {
    double square_norm;  // of all gradients
    float grad_scale;    // what gradients are multiplied by; 0: the step is left out
    u32 unused;
};
