// Activations that own their arrays, for what stands outside an executor: tests and measurements.
#pragma once

#include <vector>

#include "cpu/kernels.h"

namespace gemmart::cpu {

struct OwnedActivations {
    std::vector<int8_t> q, q_low;
    std::vector<float> d, exponent, ds32, ds16, x;
    std::vector<int32_t> significand, s32, s16;
    Activations view;

    // row(i): the n_cols numbers of column i; two_terms: with q_low
    template <typename Row>
    OwnedActivations(const Kernels& kernels, int n_tokens, int n_cols, bool two_terms, Row row) {
        const size_t n = static_cast<size_t>(n_tokens) * n_cols;
        q.resize(n), d.resize(n / 32), ds32.resize(n / 32), ds16.resize(n / 16), x.resize(n);
        significand.resize(n / 32), exponent.resize(n / 32);
        s32.resize(n / 32), s16.resize(n / 16);
        if (two_terms) q_low.resize(n);
        int8_t* low = two_terms ? q_low.data() : nullptr;
        view = {n_tokens,
                n_cols,
                {q.data(), low, d.data(), significand.data(), exponent.data(), ds32.data(), ds16.data(), s32.data(),
                 s16.data(), x.data()}};
        for (int c = 0, w; c < n_tokens; c += w) {
            w = column_group_width(n_tokens - c);
            const float* rows[kMaxWidth];
            for (int i = 0; i < w; ++i) rows[i] = row(c + i);
            const ActivationArrays to = arrays_at(view.data, static_cast<size_t>(c) * n_cols);
            kernels.quantize(rows, w, w, n_cols, to);
            kernels.interleave(rows, w, n_cols, to.x);
        }
    }
};

}  // namespace gemmart::cpu
