// The matrix instructions of tiles_mma.cuh and hip/tiles.h, as their makers' manuals say where each lane's numbers
// stand (PTX: "Matrix Fragments for mma.m16n8k16", "ldmatrix"; CDNA: v_mfma_f32_16x16x16). Lanes meet, and an
// instruction sees only what they bring.
#pragma once

namespace gemmart::gpu {

struct At {
    int row, col;
};

// c [16, n_cols] += a [16, 16] · b, once for all lanes; what they brought is an Operands with c, a and b, and c is
// left.
template <typename Operands>
void multiply_brought(unsigned char* slots) {
    static_assert(sizeof(Operands) <= emulator::kSlotBytes);
    float a[16][16], b[16][Operands::kCols], c[16][Operands::kCols];
    for (int l = 0; l < Operands::kLanes; l++) {
        Operands of;
        memcpy(&of, slots + l * emulator::kSlotBytes, sizeof of);
        for (size_t i = 0; i < std::size(of.a); i++) {
            const At at = Operands::at_a(l, static_cast<int>(i));
            a[at.row][at.col] = to_float(of.a[i]);
        }
        for (size_t i = 0; i < std::size(of.b); i++) {
            const At at = Operands::at_b(l, static_cast<int>(i));
            b[at.row][at.col] = to_float(of.b[i]);
        }
        for (size_t i = 0; i < std::size(of.c); i++) {
            const At at = Operands::at_c(l, static_cast<int>(i));
            c[at.row][at.col] = of.c[i];
        }
    }
    for (int m = 0; m < 16; m++) {
        for (int k = 0; k < 16; k++) {
            for (int n = 0; n < Operands::kCols; n++) c[m][n] = fmaf(a[m][k], b[k][n], c[m][n]);
        }
    }
    for (int l = 0; l < Operands::kLanes; l++) {
        float of[std::size(Operands{}.c)];
        for (size_t i = 0; i < std::size(of); i++) {
            const At at = Operands::at_c(l, static_cast<int>(i));
            of[i] = c[at.row][at.col];
        }
        memcpy(slots + l * emulator::kSlotBytes, of, sizeof of);
    }
}
template <typename Operands>
void multiply_together(const char* kind, Operands& mine, float* c) {
    const unsigned char* slots = emulator::meet(Operands::kLanes, kind, &mine, sizeof mine, multiply_brought<Operands>);
    memcpy(c, slots + emulator::lane_of(Operands::kLanes) * emulator::kSlotBytes, sizeof mine.c);
}

// ---- NVIDIA

// ldmatrix .x2 and .x4: of matrix j, lane l gets the numbers 2 (l % 4) and the next of row l / 4, whose address lane
// 8 j + l / 4 gave. Transposed: of column l / 4.
template <int n>
void load_matrices(uint32_t (&r)[n], const void* row, bool transposed = false) {
    if (reinterpret_cast<uintptr_t>(row) % 16) emulator::fail("ldmatrix of an address that is not a multiple of 16");
    const unsigned char* slots = emulator::meet(32, "ldmatrix", &row, sizeof row);
    const int g = emulator::lane_of(32) / 4, t = emulator::lane_of(32) % 4;
    for (int j = 0; j < n; j++) {
        const auto number = [&](int in_row, int i) -> uint32_t {
            const uint16_t* from;
            memcpy(&from, slots + (8 * j + in_row) * emulator::kSlotBytes, sizeof from);
            return from[i];
        };
        r[j] =
            transposed ? number(2 * t, g) | number(2 * t + 1, g) << 16 : number(g, 2 * t) | number(g, 2 * t + 1) << 16;
    }
}
inline void load_matrices_transposed(uint32_t (&r)[2], const void* row) { load_matrices(r, row, true); }

// mma.sync m16n8k16: groupID = l >> 2, threadID_in_group = l % 4.
template <typename T>
struct MmaOperands {
    static constexpr int kLanes = 32, kCols = 8;
    float c[4];
    T a[8], b[4];
    static At at_a(int l, int i) {
        return {i < 2 || (i >= 4 && i < 6) ? l >> 2 : (l >> 2) + 8, l % 4 * 2 + (i & 1) + (i >= 4 ? 8 : 0)};
    }
    static At at_b(int l, int i) { return {l % 4 * 2 + (i & 1) + (i >= 2 ? 8 : 0), l >> 2}; }
    static At at_c(int l, int i) { return {i < 2 ? l >> 2 : (l >> 2) + 8, l % 4 * 2 + (i & 1)}; }
};
template <typename T>
void multiply_matrices(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    MmaOperands<T> mine;
    memcpy(mine.c, c, sizeof c);
    memcpy(mine.a, a, sizeof a);
    memcpy(mine.b, b, sizeof b);
    multiply_together("mma", mine, c);
}

// ---- AMD

// v_mfma_f32_16x16x16: lane l has row l % 16 of A and column l % 16 of B, k from 4 (l / 16).
template <typename T>
struct MfmaOperands {
    static constexpr int kLanes = 64, kCols = 16;
    float c[4];
    T a[4], b[4];
    static At at_a(int l, int i) { return {l % 16, 4 * (l / 16) + i}; }
    static At at_b(int l, int i) { return {4 * (l / 16) + i, l % 16}; }
    static At at_c(int l, int i) { return {4 * (l / 16) + i, l % 16}; }
};
template <typename T>
void multiply_matrices(float (&c)[4], const T (&a)[4], const T (&b)[4]) {
    MfmaOperands<T> mine;
    memcpy(mine.c, c, sizeof c);
    memcpy(mine.a, a, sizeof a);
    memcpy(mine.b, b, sizeof b);
    multiply_together("mfma", mine, c);
}

}  // namespace gemmart::gpu
