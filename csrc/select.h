// The best candidates of a row of logits, for sampling in Python.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "cpu/kernels.h"

namespace gemmart {

struct Adjustments {
    std::span<const int32_t> bias_ids;  // logits[bias_ids[i]] += bias[i]
    std::span<const float> bias;
    std::span<const int32_t> recent;  // tokens that the penalties punish, repeats included
    float repeat_penalty = 1;         // of each recent token: positive logits divided, others multiplied
    float presence_penalty = 0;       // subtracted once for each recent token
    float frequency_penalty = 0;      // subtracted as often as it is there
    std::span<const int32_t> mask;    // [ceil(n / 32)]: token i may be chosen if bit i % 32 of mask[i / 32] is set;
};  // empty: all may

struct Candidates {
    std::vector<int32_t> ids;  // by descending logit, ties by ascending id
    std::vector<float> logits;
    double logsumexp;  // of all of the adjusted row that may be chosen, error <= 1e-5
};

// The k best of a row [n] of finite logits after bias and penalties, in this order, fewer if the mask allows fewer. The
// row is changed meanwhile, and in the end as it was. Throws std::invalid_argument for ids outside the row, for a mask
// of another length and for one that allows nothing.
Candidates select(std::span<float> row, int k, const Adjustments& adjust, const cpu::Kernels& kernels);

}  // namespace gemmart
