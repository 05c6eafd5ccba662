#include "models/models.h"

#include <cmath>
#include <cstring>

#include "error.h"

namespace gemmart {
namespace {

constexpr struct {
    const char* name;
    Config (*facts)(const GgufFile&);
} kFamilies[] = {
    {"gemma", gemma_facts},
    {"gemma2", gemma2_facts},
    {"gemma3", gemma3_facts},
    {"llama", llama_facts},
};

// A count within [1, limit].
int read_count(const GgufFile& file, const char* name, uint64_t limit) {
    const std::string key = family_key(file, name);
    const uint64_t value = file.get_uint(key);
    check<FormatError>(value >= 1 && value <= limit, file.path(), ": ", key, " is ", value, ", expected 1 to ", limit);
    return static_cast<int>(value);
}

// One count for all layers, or an array with one for each.
std::vector<int> read_layer_counts(const GgufFile& file, const char* name, size_t n_layers, uint64_t limit) {
    const std::string key = family_key(file, name);
    if (!file.is_array(key)) return std::vector<int>(n_layers, read_count(file, name, limit));
    std::vector<int> counts;
    for (int64_t value : file.get_ints(key)) {
        check<FormatError>(value >= 1 && value <= static_cast<int64_t>(limit), file.path(), ": ", key, " holds ", value,
                           ", expected 1 to ", limit);
        counts.push_back(static_cast<int>(value));
    }
    check<FormatError>(counts.size() == n_layers, file.path(), ": ", key, " has ", counts.size(), " values for ",
                       n_layers, " layers");
    return counts;
}

}  // namespace

std::string family_key(const GgufFile& file, const char* name) {
    return std::string(file.get_string("general.architecture")) + "." + name;
}

RopeFacts rope_facts(int head_dim, double base, double factor, bool neox) {
    RopeFacts rope{neox, {}};
    for (int i = 0; i < head_dim; i += 2)
        rope.inv_freq.push_back(
            static_cast<double>(static_cast<float>(1 / std::pow(base, static_cast<double>(i) / head_dim))) / factor);
    return rope;
}

Config dense_facts(const GgufFile& file, bool neox, double default_rope_base) {
    const std::string& path = file.path();
    auto key = [&](const char* name) { return family_key(file, name); };
    Config c;
    c.family = file.get_string("general.architecture");
    c.dim = read_count(file, "embedding_length", 65536);
    c.n_ctx_train = static_cast<int>(std::min<uint64_t>(file.get_uint(key("context_length"), 8192), 1 << 24));
    check<FormatError>(c.n_ctx_train >= 1, path, ": ", key("context_length"), " is 0");
    c.norm_eps = static_cast<float>(file.get_float(key("attention.layer_norm_rms_epsilon")));
    check<FormatError>(c.norm_eps >= 0 && c.norm_eps <= 0.1, path, ": ", key("attention.layer_norm_rms_epsilon"),
                       " is ", c.norm_eps, ", expected 0 to 0.1");
    check<UnsupportedError>(file.get_uint(key("expert_count"), 0) == 0, path, ": ", key("expert_count"), " is ",
                            file.get_uint(key("expert_count"), 0), ": mixtures of experts are not supported");

    const size_t n_layers = read_count(file, "block_count", 1024);
    const std::vector<int> heads = read_layer_counts(file, "attention.head_count", n_layers, 1024);
    const std::vector<int> kv_heads = file.has(key("attention.head_count_kv"))
                                          ? read_layer_counts(file, "attention.head_count_kv", n_layers, 1024)
                                          : heads;
    const std::vector<int> ffn = read_layer_counts(file, "feed_forward_length", n_layers, 1 << 20);
    int head_dim;
    if (file.has(key("attention.key_length"))) {
        head_dim = read_count(file, "attention.key_length", 1024);
    } else {
        check<FormatError>(c.dim % heads[0] == 0, path, ": ", key("attention.head_count"), " ", heads[0],
                           " does not divide ", key("embedding_length"), " ", c.dim);
        head_dim = c.dim / heads[0];
    }
    check<FormatError>(head_dim % 2 == 0, path, ": heads have ", head_dim, " components; rope needs an even number");
    check<FormatError>(head_dim <= 1024, path, ": heads have ", head_dim, " components, limit 1024");
    for (const char* name : {"attention.value_length", "rope.dimension_count"}) {
        const uint64_t value = file.get_uint(key(name), head_dim);
        check<UnsupportedError>(value == static_cast<uint64_t>(head_dim), path, ": ", key(name), " is ", value,
                                "; only heads of one size, rotated whole, are supported (here ", head_dim, ")");
    }
    for (size_t i = 0; i < n_layers; ++i) {
        check<FormatError>(heads[i] % kv_heads[i] == 0, path, ": ", key("attention.head_count_kv"), " ", kv_heads[i],
                           " does not divide ", key("attention.head_count"), " ", heads[i]);
        c.layers.push_back(
            {heads[i], kv_heads[i], head_dim, ffn[i], 0, 0, static_cast<float>(1 / std::sqrt(head_dim))});
    }

    const double base = file.get_float(key("rope.freq_base"), default_rope_base);
    check<FormatError>(std::isfinite(base) && base > 0, path, ": ", key("rope.freq_base"), " is ", base,
                       ", expected a positive number");
    double factor = 1;
    const std::string scaling(file.get_string(key("rope.scaling.type"), "none"));
    if (scaling == "linear")
        factor = file.get_float(key("rope.scaling.factor"));
    else
        check<UnsupportedError>(scaling == "none" || scaling.empty(), path, ": ", key("rope.scaling.type"), " is ",
                                scaling, "; none and linear are supported");
    check<FormatError>(std::isfinite(factor) && factor > 0, path, ": ", key("rope.scaling.factor"), " is ", factor,
                       ", expected a positive number");
    c.ropes.push_back(rope_facts(head_dim, base, factor, neox));
    return c;
}

Config read_config(const GgufFile& file) {
    const std::string_view family = file.get_string("general.architecture");
    std::string known;
    for (const auto& [name, facts] : kFamilies) {
        if (family == name) return facts(file);
        known += (known.empty() ? "" : ", ") + std::string(name);
    }
    throw UnsupportedError(message(file.path(), ": general.architecture is ", family, "; supported: ", known));
}

}  // namespace gemmart
