// Formats without a layout of their own: their blocks stand as in the file, those of 32 rows one behind the other.
#pragma once

#include "cuda/packed.cuh"

namespace gemmart::gpu {

template <typename Block>
struct Packed {
    static constexpr Kind kKind = Kind::Blocks;
    static constexpr int kBlocks = kUnit / Block::kSize, kLaneBytes = kBlocks * static_cast<int>(sizeof(Block));

    static __device__ __forceinline__ const Block& block(const std::byte* unit, int lane, int i) {
        return reinterpret_cast<const Block*>(unit)[i * kPanel + lane];
    }
    static __device__ void pack(const Block* blocks, int n, std::byte* unit, int lane) {
        for (int i = 0; i < kBlocks; ++i)
            reinterpret_cast<Block*>(unit)[i * kPanel + lane] = i < n ? blocks[i] : Block{};
    }
};

}  // namespace gemmart::gpu
