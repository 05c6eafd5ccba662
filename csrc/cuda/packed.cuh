// What the packed formats share: planes, and codes of few bits that become bytes.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <stdexcept>

#include "cuda/device.cuh"
#include "formats/all.h"
#include "tensor.h"

namespace gemmart::gpu {

inline constexpr int kPanel = 32;  // rows
inline constexpr int kUnit = 256;  // columns

// Integers: weight = scale · (code − kBias) − offset, where 16 columns (kParts = 2) or 32 share scale and offset.
// Floats: the numbers themselves. Blocks: as in the file, decoded by formats/.
enum class Kind { Integers, Floats, Blocks };

// How a format lies in a unit:
//   kLaneBytes              bytes of a unit that belong to one row
//   kTurn                   groups of 32 columns that a warp loads at once: a unit's turns begin at multiples of it
//   Head, load_head()       scales and minima of a turn, as loaded
//   Codes, load_codes()     codes of a group, as loaded
//   unpack(codes, bytes)    int8 [8 words][4]: word i holds columns 4i … 4i + 3
//   scales(head, first, i, scale, offset)      of group first + i, the i-th of a turn
//   pack(blocks, n, unit, lane)                n blocks of a row, at most a unit's, become the lane's part of a unit
// Floats have no head and pieces of 16 bytes (packed_floats.cuh). The template argument is a block of formats.def.
template <typename Block>
struct Packed;

// The lane's part of a plane that begins `offset` bytes a lane into the unit.
template <typename T>
static __device__ __forceinline__ T load_plane(const std::byte* unit, int offset, int lane) {
    return reinterpret_cast<const T*>(unit + kPanel * offset)[lane];
}
template <typename T>
static __device__ __forceinline__ void store_plane(std::byte* unit, int offset, int lane, T value) {
    reinterpret_cast<T*>(unit + kPanel * offset)[lane] = value;
}

// The half in the lower 16 bits.
static __device__ __forceinline__ float low_half(uint32_t bits) {
    const auto low = static_cast<uint16_t>(bits);
    __half half;
    memcpy(&half, &low, 2);
    return to_float(half);
}
static __device__ __forceinline__ float high_half(uint32_t bits) { return low_half(bits >> 16); }

// n - bias as a float, n < 2^23, without the slow unit that converts.
static __device__ __forceinline__ float small_float(uint32_t n, int bias) {
    return float_from_bits(0x4b000000 | n) - static_cast<float>(0x800000 + bias);
}
// d · n, rounded once: both products inside of the sum are exact.
static __device__ __forceinline__ float times_small(float d, uint32_t n) {
    return fmaf(d, float_from_bits(0x4b000000 | n), -8388608.f * d);
}

// ---- Codes of four, two and one bits. code(k): of column k of a group.

// Byte 4j + b: columns 4j + b (low half) and 4j + b + 16.
template <typename F>
static __device__ uint4 nibbles(F code) {
    uint32_t words[4] = {};
    for (int k = 0; k < 32; ++k) words[k % 16 / 4] |= code(k) << (8 * (k % 4) + k / 16 * 4);
    return {words[0], words[1], words[2], words[3]};
}
static __device__ __forceinline__ void unpack_nibbles(const uint4& from, unsigned (&codes)[8]) {
    const unsigned words[4] = {from.x, from.y, from.z, from.w};
#pragma unroll
    for (int j = 0; j < 4; ++j) {
        codes[j] = words[j] & 0x0f0f0f0f;
        codes[j + 4] = words[j] >> 4 & 0x0f0f0f0f;
    }
}

// Byte 4j + b: columns 16j + b, 16j + 4 + b …, low bits first.
template <typename F>
static __device__ uint2 crumbs(F code) {
    uint32_t words[2] = {};
    for (int k = 0; k < 32; ++k) words[k / 16] |= code(k) << (8 * (k % 4) + k % 16 / 4 * 2);
    return {words[0], words[1]};
}
// Adds them as bits kBit and kBit + 1.
template <int kBit>
static __device__ __forceinline__ void add_crumbs(const uint2& from, unsigned (&codes)[8]) {
#pragma unroll
    for (int i = 0; i < 8; ++i) {
        const unsigned word = i < 4 ? from.x : from.y;
        const int at = 2 * (i % 4);
        codes[i] |= (at < kBit ? word << (kBit - at) : word >> (at - kBit)) & 0x03030303u << kBit;
    }
}

// Bit i of byte b: column 4i + b.
template <typename F>
static __device__ uint32_t single_bits(F code) {
    uint32_t word = 0;
    for (int k = 0; k < 32; ++k) word |= code(k) << (8 * (k % 4) + k / 4);
    return word;
}
template <int kBit>
static __device__ __forceinline__ void add_bits(uint32_t word, unsigned (&codes)[8]) {
#pragma unroll
    for (int i = 0; i < 8; ++i) codes[i] |= (i < kBit ? word << (kBit - i) : word >> (i - kBit)) & 0x01010101u << kBit;
}

// ---- Codes of four bits that number one of sixteen levels: nibbles in order, so that byte permutations find them.

template <typename F>
static __device__ uint4 ordered_nibbles(F code) {
    uint32_t words[4] = {};
    for (int k = 0; k < 32; ++k) words[k / 8] |= code(k) << 4 * (k % 8);
    return {words[0], words[1], words[2], words[3]};
}

struct Levels {
    unsigned words[4];  // sixteen int8
};
static __device__ __forceinline__ void unpack_levels(const uint4& from, Levels levels, unsigned (&codes)[8]) {
    const unsigned words[4] = {from.x, from.y, from.z, from.w};
#pragma unroll
    for (int j = 0; j < 4; ++j) {
        const unsigned which = words[j] & 0x77777777;
        const unsigned upper = (words[j] & 0x88888888) >> 1 | 0x32103210;  // byte i of the first or of the second four
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            const unsigned low = __byte_perm(levels.words[0], levels.words[1], which >> 16 * i);
            const unsigned high = __byte_perm(levels.words[2], levels.words[3], which >> 16 * i);
            codes[2 * j + i] = __byte_perm(low, high, upper >> 16 * i);
        }
    }
}

}  // namespace gemmart::gpu
