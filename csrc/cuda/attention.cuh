// What all attention kernels share: where a segment's keys and values lie, and what a row sees of them.
//
// A kv head's part of a page (kv_layout.h) holds 32 positions: keys [head_dim][32], a row of which is one component of
// all positions, and values [blocks of 32 components][32 positions][32]. The heads of a group, which share a kv head,
// are rows beside each other: row i of a segment is head i % n_group_heads of token i / n_group_heads.
#pragma once

#include "cuda/kernels.cuh"

namespace gemmart::gpu {

// Positions [begin, end).
struct Span {
    int begin, end;
    __device__ bool holds(int position) const { return position >= begin && position < end; }
    // Whether it has any, or all, of a page's positions.
    __device__ bool touches(int page) const { return begin < (page + 1) * kPageTokens && end > page * kPageTokens; }
    __device__ bool covers(int page) const { return begin <= page * kPageTokens && end >= (page + 1) * kPageTokens; }
};

// What the token at `position` sees.
__device__ __forceinline__ Span seen_from(int position, int window) {
    return {window && position >= window ? position - window + 1 : 0, position + 1};
}

// The kv head's part of page number `page` of a segment.
__device__ __forceinline__ const std::byte* page_part(const Places& places, const AttentionLayer& layer, int segment,
                                                      int page, int kv_head) {
    const int32_t* pages = layer.kv.group == 0 ? places.pages[0] : places.pages[1];  // an index would copy `places`
    const int id = pages[static_cast<size_t>(segment) * places.max_pages + page];
    return layer.kv.base + id * layer.kv.page_bytes + kv_head * layer.kv.layout.n_bytes;
}

__device__ __forceinline__ float larger(float a, float b) { return b > a ? b : a; }

// The kernels for FEW and for MANY rows (attention_few.cu, attention_many.cu).
void attend_few(const Places& places, const AttentionLayer& layer, const float* q, float* out, std::byte* scratch,
                cudaStream_t stream);
void attend_many(const Places& places, const AttentionLayer& layer, const float* q, float* out, cudaStream_t stream);

}  // namespace gemmart::gpu
