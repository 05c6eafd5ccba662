// Tiles of the three kinds that devices have, chosen when compiling:
//
//   GEMMART_EMULATED_WAVE=32           mma.sync m16n8k16, see tiles_mma.cuh
//   GEMMART_EMULATED_WAVE=64           v_mfma_f32_16x16x16 of CDNA, see hip/tiles.h
//   GEMMART_EMULATED_PLAIN_TILES=1     no tensor cores: 32 lanes, 16 columns, each lane every second row of one column
//
// A lane holds what it would hold there, and multiply() sees only what the lanes bring.
#pragma once

#ifndef GEMMART_EMULATED_WAVE
#define GEMMART_EMULATED_WAVE 32
#endif
#ifndef GEMMART_EMULATED_PLAIN_TILES
#define GEMMART_EMULATED_PLAIN_TILES 0
#endif

#if GEMMART_EMULATED_PLAIN_TILES

namespace gemmart::gpu {

inline constexpr int kTileN = 16, kTileLanes = 32, kTileElements = 8;
inline int tile_row(int i) { return 2 * i + lane() / 16; }
inline int tile_col(int) { return lane() % 16; }
struct TileC {
    float x[kTileElements];
};

}  // namespace gemmart::gpu

#include "cuda/tiles_plain.cuh"

#else

namespace gemmart::gpu {

inline constexpr int kTileLanes = GEMMART_EMULATED_WAVE;
inline constexpr int kTileN = kTileLanes == 64 ? 16 : 8;
inline constexpr int kTileElements = kTileM * kTileN / kTileLanes;

// Where lane l's elements of A (row, k), B (k, column) and C (row, column) stand.
struct At {
    int row, col;
};
inline constexpr int kElementsA = kTileM * kTileK / kTileLanes, kElementsB = kTileK * kTileN / kTileLanes;
inline At at_a(int l, int i) {
    if (kTileLanes == 64) return {l % 16, l / 16 * 4 + i};
    return {l / 4 + i / 2 % 2 * 8, l % 4 * 2 + i % 2 + i / 4 * 8};
}
inline At at_b(int l, int i) {
    if (kTileLanes == 64) return {l / 16 * 4 + i, l % 16};
    return {l % 4 * 2 + i % 2 + i / 2 * 8, l / 4};
}
inline At at_c(int l, int i) {
    if (kTileLanes == 64) return {l / 16 * 4 + i, l % 16};
    return {l / 4 + i / 2 * 8, l % 4 * 2 + i % 2};
}

inline int tile_lane() { return emulator::lane_of(kTileLanes); }
inline int tile_row(int i) { return at_c(tile_lane(), i).row; }
inline int tile_col(int i) { return at_c(tile_lane(), i).col; }

template <typename T>
struct TileA {
    T x[kElementsA];
};
template <typename T>
struct TileB {
    T x[kElementsB];
};
struct TileC {
    float x[kTileElements];
};

// All lanes load together, from the same place.
struct LoadFrom {
    const void* shared;
    int ld;
};
inline void meet_to_load(const char* kind, const void* shared, int ld) {
    if (reinterpret_cast<uintptr_t>(shared) % 16 || ld % 8) {
        emulator::fail(std::string(kind) + ": rows that do not begin at multiples of 16 bytes");
    }
    const LoadFrom mine{shared, ld};
    const unsigned char* slots = emulator::meet(kTileLanes, kind, &mine, sizeof mine);
    LoadFrom first;
    memcpy(&first, slots, sizeof first);
    if (first.shared != shared || first.ld != ld) emulator::fail(std::string(kind) + ": lanes load different tiles");
}

template <typename T>
void load_a(TileA<T>& a, const T* shared, int ld) {
    meet_to_load("load_a", shared, ld);
    for (int i = 0; i < kElementsA; i++) {
        const At at = at_a(tile_lane(), i);
        a.x[i] = shared[at.row * ld + at.col];
    }
}
template <typename T>
void load_b(TileB<T>& b, const T* shared, int ld) {
    meet_to_load("load_b", shared, ld);
    for (int i = 0; i < kElementsB; i++) {
        const At at = at_b(tile_lane(), i);
        b.x[i] = shared[at.col * ld + at.row];
    }
}
template <typename T>
void load_b_transposed(TileB<T>& b, const T* shared, int ld) {
    meet_to_load("load_b_transposed", shared, ld);
    for (int i = 0; i < kElementsB; i++) {
        const At at = at_b(tile_lane(), i);
        b.x[i] = shared[at.row * ld + at.col];
    }
}

template <typename T>
struct Operands {
    TileA<T> a;
    TileB<T> b;
    TileC c;
};

// Once for all lanes, on what they brought; C is left in their slots.
template <typename T>
void multiply_slots(unsigned char* slots) {
    static_assert(sizeof(Operands<T>) <= emulator::kSlotBytes);
    float a[kTileM][kTileK], b[kTileK][kTileN], c[kTileM][kTileN];
    for (int l = 0; l < kTileLanes; l++) {
        Operands<T> of;
        memcpy(&of, slots + l * emulator::kSlotBytes, sizeof of);
        for (int i = 0; i < kElementsA; i++) a[at_a(l, i).row][at_a(l, i).col] = to_float(of.a.x[i]);
        for (int i = 0; i < kElementsB; i++) b[at_b(l, i).row][at_b(l, i).col] = to_float(of.b.x[i]);
        for (int i = 0; i < kTileElements; i++) c[at_c(l, i).row][at_c(l, i).col] = of.c.x[i];
    }
    for (int m = 0; m < kTileM; m++) {
        for (int k = 0; k < kTileK; k++) {
            for (int n = 0; n < kTileN; n++) c[m][n] = fmaf(a[m][k], b[k][n], c[m][n]);
        }
    }
    for (int l = 0; l < kTileLanes; l++) {
        TileC of;
        for (int i = 0; i < kTileElements; i++) of.x[i] = c[at_c(l, i).row][at_c(l, i).col];
        memcpy(slots + l * emulator::kSlotBytes, &of, sizeof of);
    }
}

template <typename T>
void multiply(TileC& c, const TileA<T>& a, const TileB<T>& b) {
    const Operands<T> mine{a, b, c};
    const unsigned char* slots = emulator::meet(kTileLanes, "multiply", &mine, sizeof mine, multiply_slots<T>);
    memcpy(&c, slots + tile_lane() * emulator::kSlotBytes, sizeof c);
}

}  // namespace gemmart::gpu

#endif
