// Llama 2 and 3 and what is built like them: two norms a layer, SiLU gate. Converters reorder the rows of query and key
// so that rope rotates neighbours. Llama 3 stores a divisor for each frequency in the tensor rope_freqs.weight.
#include "error.h"
#include "models/models.h"

namespace gemmart {

Config llama_facts(const GgufFile& file) {
    Config c = dense_facts(file, /*neox=*/false, 10000);
    c.activation = Activation::Silu;
    if (const Tensor* factors = file.find("rope_freqs.weight")) {
        c.fact_tensors.push_back(factors->name);
        std::vector<double>& inv_freq = c.ropes[0].inv_freq;
        check<FormatError>(factors->shape.size() == 1 && factors->shape[0] == static_cast<int64_t>(inv_freq.size()) &&
                               factors->dtype == DType::F32,
                           file.path(), ": tensor rope_freqs.weight: expected F32 [", inv_freq.size(),
                           "] (head_dim / 2)");
        std::vector<float> values(inv_freq.size());
        file.bytes().read(factors->offset, values.data(), factors->n_bytes);
        for (size_t i = 0; i < values.size(); ++i) {
            check<FormatError>(values[i] > 0, file.path(), ": tensor rope_freqs.weight: element ", i, " is ", values[i],
                               ", expected > 0");
            inv_freq[i] /= values[i];
        }
    }
    return c;
}

}  // namespace gemmart
