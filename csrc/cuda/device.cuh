// All that kernels know of the device they are compiled for: CUDA, HIP (hip/compat.h) or the CPU that stands in for
// one in tests (emulator/). Kernels include this only, and use no other syntax or instruction of one of them.
//
// - Every kernel calls wait_for_previous() before it touches what another kernel wrote.
// - Lanes come in groups of 32, whatever the hardware's wave is: no masks of lanes, no branches around what lanes do
//   together, no return before a __syncthreads.
// - __shared__ arrays as usual; memory of a size that the launch gives: SHARED_MEMORY(name).
#pragma once

#if defined(GEMMART_EMULATED)
#define GEMMART_CUDA 0
#define GEMMART_HIP 0
#include "emulator/runtime.h"
#elif defined(__HIPCC__)
#define GEMMART_CUDA 0
#define GEMMART_HIP 1
#define GEMMART_EMULATED 0
#include "hip/compat.h"
#else
#define GEMMART_CUDA 1
#define GEMMART_HIP 0
#define GEMMART_EMULATED 0
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#endif

// Declares unsigned char* name, aligned to 128 bytes: the shared memory whose size launch() was given.
#if GEMMART_EMULATED
#define SHARED_MEMORY(name) unsigned char* name = gemmart::emulator::shared_memory()
#else
extern __shared__ __align__(128) unsigned char gemmart_shared_memory[];
#define SHARED_MEMORY(name) unsigned char* name = gemmart_shared_memory
#endif

#include "cuda/copies.cuh"
#include "cuda/lanes.cuh"
#include "cuda/launch.cuh"
#include "cuda/numbers.cuh"
#include "cuda/tiles.cuh"
