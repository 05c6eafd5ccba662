#include "select.h"

#include <algorithm>
#include <cmath>
#include <map>

#include "error.h"

namespace gemmart {
namespace {

struct Candidate {
    float logit;
    int32_t id;
};

bool better(const Candidate& a, const Candidate& b) { return a.logit > b.logit || (a.logit == b.logit && a.id < b.id); }

void adjust_row(std::span<float> row, const Adjustments& adjust) {
    auto at = [&](int32_t id) -> float& {
        check<std::invalid_argument>(id >= 0 && id < static_cast<int64_t>(row.size()), "token id ", id,
                                     " is outside [0, ", row.size(), ")");
        return row[id];
    };
    for (size_t i = 0; i < adjust.bias_ids.size(); ++i) at(adjust.bias_ids[i]) += adjust.bias[i];
    if (adjust.repeat_penalty == 1 && adjust.presence_penalty == 0 && adjust.frequency_penalty == 0) return;
    std::map<int32_t, int> counts;
    for (int32_t id : adjust.recent) ++counts[id];
    for (const auto& [id, count] : counts) {
        float& logit = at(id);
        logit = logit > 0 ? logit / adjust.repeat_penalty : logit * adjust.repeat_penalty;
        logit -= adjust.presence_penalty + adjust.frequency_penalty * static_cast<float>(count);
    }
}

}  // namespace

Candidates select(std::span<float> row, int k, const Adjustments& adjust) {
    const int n = static_cast<int>(row.size());
    check<std::invalid_argument>(k >= 1, "k is ", k, ", expected at least 1");
    adjust_row(row, adjust);
    k = std::min(k, n);

    // A heap of the k best so far, the worst on top; most logits fall below it.
    std::vector<Candidate> heap;
    heap.reserve(k);
    for (int i = 0; i < n; ++i) {
        if (static_cast<int>(heap.size()) == k) {
            if (row[i] <= heap.front().logit) continue;  // an equal one has a higher id
            std::pop_heap(heap.begin(), heap.end(), better);
            heap.pop_back();
        }
        heap.push_back({row[i], i});
        std::push_heap(heap.begin(), heap.end(), better);
    }
    std::sort_heap(heap.begin(), heap.end(), better);

    Candidates out;
    for (const Candidate& c : heap) {
        out.ids.push_back(c.id);
        out.logits.push_back(c.logit);
    }
    double sum = 0;
    for (float logit : row) sum += std::exp(logit - out.logits[0]);
    out.logsumexp = out.logits[0] + std::log(sum);
    return out;
}

}  // namespace gemmart
