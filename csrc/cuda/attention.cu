// Attention of a pass: its few rows by ranges of positions, its many rows by tiles.
#include "cuda/attention.cuh"

namespace gemmart::gpu {

void attention(const Places& places, const AttentionLayer& layer, const float* q, float* out, std::byte* scratch,
               cudaStream_t stream) {
    if (places.n_few > 0) attend_few(places, layer, q, out, scratch, stream);
    if (places.n > places.n_few) attend_many(places, layer, q, out, stream);
}

}  // namespace gemmart::gpu
