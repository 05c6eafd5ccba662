// Gemma 2: Gemma with a norm after each sub-layer, soft caps on scores and logits, and a window on every even layer.
#include <cmath>

#include "error.h"
#include "models/models.h"

namespace gemmart {

Config gemma2_facts(const GgufFile& file) {
    Config c = gemma_facts(file);
    c.post_norms = true;
    // Files of the family's first weeks lack these keys; the values are the published ones.
    c.attention_softcap = static_cast<float>(file.get_float(family_key(file, "attn_logit_softcapping"), 50));
    c.final_softcap = static_cast<float>(file.get_float(family_key(file, "final_logit_softcapping"), 30));
    for (float cap : {c.attention_softcap, c.final_softcap})
        check<FormatError>(std::isfinite(cap) && cap >= 0, file.path(), ": a soft cap is ", cap,
                           ", expected a number >= 0");
    const int window = static_cast<int>(
        std::min<uint64_t>(file.get_uint(family_key(file, "attention.sliding_window"), 4096), 1 << 30));
    for (size_t i = 0; i < c.layers.size(); ++i) {
        LayerFacts& layer = c.layers[i];
        if (i % 2 == 0) layer.window = window;
        // The 27B divides queries by sqrt(dim / n_heads) = 12, not by sqrt(head_dim): query_pre_attn_scalar is 144
        // there. The file does not say so; its 46 layers do.
        if (c.layers.size() == 46) layer.query_scale = 1 / std::sqrt(static_cast<float>(c.dim) / layer.n_heads);
    }
    return c;
}

}  // namespace gemmart
