// gemmart_kernel_attention(), gemmart_kernel_cap() and gemmart_kernel_select() of kernel_abi.h.
#include <algorithm>
#include <vector>

#include "cuda/kernel_abi.h"
#include "cuda/kernel_tests.cuh"
#include "cuda/kernels.cuh"
#include "cuda/status.cuh"

namespace gemmart::gpu {
namespace {

// The rows of segments, as the executor would describe them.
struct TestRows {
    std::vector<int32_t> positions, segment_of, first_row{0};
    int n = 0, n_few = 0, n_few_segments = 0, last_position = 0;

    explicit TestRows(const GemmartAttentionTest& test) {
        for (int s = 0; s < test.n_segments; s++) {
            for (int i = 0; i < test.n_tokens[s]; i++) {
                positions.push_back(test.starts[s] + i);
                segment_of.push_back(s);
            }
            n += test.n_tokens[s];
            first_row.push_back(n);
            last_position = std::max(last_position, positions.back());
            if (test.n_tokens[s] <= kFewTokens) n_few = n, n_few_segments = s + 1;
        }
    }
};

void run(GemmartAttentionTest& test) {
    const TestRows rows(test);
    const TestStream stream;
    const auto floats = [](const float* from, size_t n) { return on_device(from, from ? n : 0); };

    AttentionLayer layer{};
    layer.n_heads = test.n_heads, layer.n_kv_heads = test.n_kv_heads, layer.head_dim = test.head_dim;
    layer.window = test.window, layer.query_scale = test.query_scale, layer.softcap = test.softcap;
    layer.neox = test.neox != 0, layer.eps = test.eps;
    layer.kv.type = static_cast<KvType>(test.kv_type);
    layer.kv.layout = kv_head_layout(layer.kv.type, test.head_dim);
    layer.kv.page_bytes = layer.kv.layout.n_bytes * test.n_kv_heads;
    layer.kv.group = test.window ? Windowed : Global;

    const size_t n_kv = layer.kv.page_bytes * test.n_pages;
    const size_t n_q = static_cast<size_t>(rows.n) * test.n_heads * test.head_dim;
    const size_t n_k = static_cast<size_t>(rows.n) * test.n_kv_heads * test.head_dim;
    const int half = test.head_dim / 2;
    const DeviceMemory kv = on_device(static_cast<const std::byte*>(test.kv), n_kv);
    const DeviceMemory q = on_device(test.q, n_q), k = on_device(test.k, n_k), v = on_device(test.v, n_k);
    const DeviceMemory q_norm = floats(test.q_norm, test.head_dim), k_norm = floats(test.k_norm, test.head_dim);
    const DeviceMemory inv_freq = on_device(test.inv_freq, half);
    const DeviceMemory cosines(rows.n * half * sizeof(float), "angles"), sines(rows.n * half * sizeof(float), "angles");
    const DeviceMemory out(n_q * sizeof(float), "out");
    const DeviceMemory scratch(attention_scratch_bytes(rows.n_few, test.n_heads, test.head_dim, rows.last_position + 1),
                               "scratch");
    layer.kv.base = kv.data();
    layer.q_norm = test.q_norm ? q_norm.as<float>() : nullptr;
    layer.k_norm = test.k_norm ? k_norm.as<float>() : nullptr;
    layer.cosines = cosines.as<float>(), layer.sines = sines.as<float>();

    const DeviceMemory positions = on_device(rows.positions.data(), rows.n);
    const DeviceMemory segment_of = on_device(rows.segment_of.data(), rows.n);
    const DeviceMemory first_row = on_device(rows.first_row.data(), rows.first_row.size());
    const DeviceMemory pages = on_device(test.pages, static_cast<size_t>(test.n_segments) * test.max_pages);
    Places places{};
    places.n = rows.n, places.n_few = rows.n_few;
    places.n_segments = test.n_segments, places.n_few_segments = rows.n_few_segments;
    places.positions = positions.as<int32_t>(), places.segment_of = segment_of.as<int32_t>();
    places.first_row = first_row.as<int32_t>();
    places.max_pages = test.max_pages, places.pages[layer.kv.group] = pages.as<int32_t>();
    places.last_position = rows.last_position;

    // What nobody writes would be NaN.
    check_device(cudaMemset(out.data(), 0xff, out.size()), "out");
    check_device(cudaMemset(scratch.data(), 0xff, scratch.size()), "scratch");
    rope_angles(places, inv_freq.as<double>(), half, cosines.as<float>(), sines.as<float>(), stream.get());
    place_heads(places, layer, q.as<float>(), k.as<float>(), v.as<float>(), stream.get());
    test.seconds = stream.seconds_of(
        test.repeats, [&] { attention(places, layer, q.as<float>(), out.as<float>(), scratch.data(), stream.get()); });
    to_host(static_cast<std::byte*>(test.kv), kv, n_kv);
    to_host(test.out, out, n_q);
}

void run(GemmartSelectTest& test) {
    const TestStream stream;
    const DeviceMemory logits = on_device(test.logits, test.n_vocab);
    const DeviceMemory bias_ids = on_device(test.bias_ids, test.n_bias), bias = on_device(test.bias, test.n_bias);
    const DeviceMemory recent = on_device(test.recent, test.n_recent);
    const DeviceMemory mask = on_device(test.mask, test.mask ? (test.n_vocab + 31) / 32 : 0);
    const DeviceMemory ids(test.k * sizeof(int32_t), "ids"), best(test.k * sizeof(float), "best");
    const DeviceMemory logsumexp(sizeof(double), "logsumexp"), n_found(sizeof(int32_t), "n_found");
    const DeviceMemory scratch(select_scratch_bytes(test.n_vocab, test.k), "scratch");
    check_device(cudaMemset(scratch.data(), 0xff, scratch.size()), "scratch");
    select({logits.as<float>(), test.n_vocab, test.k, test.n_bias, test.n_recent, bias_ids.as<int32_t>(),
            recent.as<int32_t>(), bias.as<float>(), test.repeat_penalty, test.presence_penalty, test.frequency_penalty,
            test.mask ? mask.as<int32_t>() : nullptr, ids.as<int32_t>(), best.as<float>(), logsumexp.as<double>(),
            n_found.as<int32_t>()},
           scratch.data(), stream.get());
    stream.wait();
    to_host(test.logits, logits, test.n_vocab);
    to_host(test.ids, ids, test.k);
    to_host(test.best, best, test.k);
    to_host(&test.logsumexp, logsumexp, 1);
    to_host(&test.n_found, n_found, 1);
}

}  // namespace
}  // namespace gemmart::gpu

using namespace gemmart::gpu;

extern "C" __attribute__((visibility("default"))) int32_t gemmart_kernel_attention(GemmartAttentionTest* test) {
    return guarded([&] { run(*test); });
}

extern "C" __attribute__((visibility("default"))) int32_t gemmart_kernel_select(GemmartSelectTest* test) {
    return guarded([&] { run(*test); });
}

extern "C" __attribute__((visibility("default"))) int32_t gemmart_kernel_cap(int32_t n, int32_t n_cols, float cap,
                                                                             float* logits, uint8_t* finite) {
    return guarded([&] {
        const TestStream stream;
        const size_t size = static_cast<size_t>(n) * n_cols;
        const DeviceMemory on = on_device(logits, size), flags(n, "flags");
        cap_logits(on.as<float>(), n, n_cols, cap, flags.as<uint8_t>(), stream.get());
        stream.wait();
        to_host(logits, on, size);
        to_host(finite, flags, n);
    });
}
