// A page's keys and values as tiles in shared memory, in the form that tensor cores multiply.
//
// Rows of both have 32 neighbours (kv_layout.h) and here 8 elements more, so that 16-byte pieces of eight rows lie in
// different banks. 16-bit types are copied as they are while the block computes. Numbers of 32 and of 8 bits become
// two bf16 terms, high + low, of 16 significant bits; keys and values then take turns in the same room.
#pragma once

#include "cuda/attention.cuh"

namespace gemmart::gpu {

inline constexpr int kPageLd = kPageTokens + 8;

// Elements of 16-bit pages.
template <typename T>
struct CopiedPages {
    using Element = T;
    static constexpr int kTerms = 1;
    static constexpr bool kCopied = true;

    static __device__ void copy_keys(const KvLayerPart& kv, const std::byte* part, int head_dim, int thread,
                                     int n_threads, T* to) {
        const T* from = reinterpret_cast<const T*>(part + kv.layout.keys);
        for (int i = thread; i < head_dim * 4; i += n_threads)
            copy_async16(to + i / 4 * kPageLd + i % 4 * 8, from + i * 8);
    }
    // Those of the page's first n_slots positions; zeros in the place of others, which may be anything.
    static __device__ void copy_values(const KvLayerPart& kv, const std::byte* part, int head_dim, int n_slots,
                                       int thread, int n_threads, T* to) {
        const T* from = reinterpret_cast<const T*>(part + kv.layout.values);
        for (int i = thread; i < (head_dim + 31) / 32 * 32 * 4; i += n_threads) {
            T* at = to + i / 4 * kPageLd + i % 4 * 8;
            if (i / 4 % kPageTokens < n_slots)
                copy_async16(at, from + i * 8);
            else
                *reinterpret_cast<uint4*>(at) = uint4{};
        }
    }
};

// Of F32 or Q8_0 pages. The low terms stand behind the high ones, `plane` elements further.
struct ConvertedPages {
    using Element = __nv_bfloat16;
    static constexpr int kTerms = 2;
    static constexpr bool kCopied = false;

    static __device__ __forceinline__ void put_terms(float x, __nv_bfloat16* high, __nv_bfloat16* low) {
        *high = round_to<__nv_bfloat16>(x);
        *low = round_to<__nv_bfloat16>(x - to_float(*high));
    }
    // Four neighbours of a row.
    static __device__ __forceinline__ void put_four(const float (&x)[4], __nv_bfloat16* to, int plane) {
        uint2 high, low;
        high.x = round_pair<__nv_bfloat16>(x[0], x[1]), high.y = round_pair<__nv_bfloat16>(x[2], x[3]);
        const float2 a = pair_to_floats<__nv_bfloat16>(high.x), b = pair_to_floats<__nv_bfloat16>(high.y);
        low.x = round_pair<__nv_bfloat16>(x[0] - a.x, x[1] - a.y);
        low.y = round_pair<__nv_bfloat16>(x[2] - b.x, x[3] - b.y);
        *reinterpret_cast<uint2*>(to) = high;
        *reinterpret_cast<uint2*>(to + plane) = low;
    }

    static __device__ void copy_keys(const KvLayerPart& kv, const std::byte* part, int head_dim, int plane, int thread,
                                     int n_threads, __nv_bfloat16* to) {
        if (kv.type == KvType::F32) {
            const float4* from = reinterpret_cast<const float4*>(part + kv.layout.keys);
            for (int i = thread; i < head_dim * 8; i += n_threads) {
                const float4 x = from[i];
                put_four({x.x, x.y, x.z, x.w}, to + i / 8 * kPageLd + i % 8 * 4, plane);
            }
        } else {  // a word has four components of a position
            const uint32_t* from = reinterpret_cast<const uint32_t*>(part + kv.layout.keys);
            const float* scales = reinterpret_cast<const float*>(part + kv.layout.key_scales);
            for (int i = thread; i < head_dim * 8; i += n_threads) {
                const uint32_t word = from[i];
                const float scale = scales[i / kPageTokens / 8 * kPageTokens + i % kPageTokens];
                __nv_bfloat16* at = to + i / kPageTokens * 4 * kPageLd + i % kPageTokens;
#pragma unroll
                for (int j = 0; j < 4; j++) {
                    const float x = static_cast<float>(static_cast<int8_t>(word >> 8 * j)) * scale;
                    put_terms(x, at + j * kPageLd, at + j * kPageLd + plane);
                }
            }
        }
    }
    static __device__ void copy_values(const KvLayerPart& kv, const std::byte* part, int head_dim, int n_slots,
                                       int plane, int thread, int n_threads, __nv_bfloat16* to) {
        for (int i = thread; i < (head_dim + 31) / 32 * 32 * 8; i += n_threads) {
            float x[4] = {};
            if (i / 8 % kPageTokens < n_slots) {
                if (kv.type == KvType::F32) {
                    const float4 all = reinterpret_cast<const float4*>(part + kv.layout.values)[i];
                    x[0] = all.x, x[1] = all.y, x[2] = all.z, x[3] = all.w;
                } else {
                    const uint32_t word = reinterpret_cast<const uint32_t*>(part + kv.layout.values)[i];
                    const float scale = reinterpret_cast<const float*>(part + kv.layout.value_scales)[i / 8];
#pragma unroll
                    for (int j = 0; j < 4; j++) x[j] = static_cast<float>(static_cast<int8_t>(word >> 8 * j)) * scale;
                }
            }
            put_four(x, to + i / 8 * kPageLd + i % 8 * 4, plane);
        }
    }
};

}  // namespace gemmart::gpu
