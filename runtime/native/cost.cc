// The time of a step, with the operations of runtime/cost.py in their order.
#include "cost.h"

#include <algorithm>
#include <utility>

namespace sagec {
namespace {

constexpr size_t MOST_SHARES = 1 << 16;

// Of 0 tokens, 1, 2, ...: the share of a layer's experts that one of them goes to, on average.
std::vector<double> expert_shares(double experts, double experts_per_token) {
    if (experts == 0.0)
        return {1.0};
    std::vector<double> shares{0.0};
    const double others = 1.0 - std::min(1.0, experts_per_token / experts);
    for (double missed = 1.0; shares.size() < MOST_SHARES;) {
        missed *= others;
        const double share = 1.0 - missed;
        if (share == shares.back())
            break;
        shares.push_back(share);
    }
    return shares;
}

} // namespace

Curve Curve::of(double begin_us, std::vector<double> knots, std::vector<double> slopes) {
    Curve curve;
    curve.us.push_back(begin_us);
    for (size_t i = 1; i < knots.size(); ++i)
        curve.us.push_back(curve.us.back() + slopes[i - 1] * (knots[i] - knots[i - 1]));
    const bool is_line = knots.back() == 0.0;
    curve.mean_slope = is_line ? slopes.back() : (curve.us.back() - begin_us) / knots.back();
    curve.knots = std::move(knots);
    curve.slopes = std::move(slopes);
    return curve;
}

double Curve::one(double count) const {
    const auto piece = std::upper_bound(knots.begin(), knots.end(), count) - knots.begin() - 1;
    return us[piece] + slopes[piece] * (count - knots[piece]);
}

double Fit::one(double tokens, double pairs, double context_tokens, double decodes) const {
    if (tokens <= decodes)
        return decode.one(tokens) + context_us * context_tokens;
    const double alone = prefill.one(tokens - decodes);
    const double prompts = alone + pair_us * (pairs - context_tokens);
    if (decodes <= 0)
        return prompts;
    const double saved = alone + prefill.one(decodes) - prefill.one(tokens);
    return prompts + (decode.one(decodes) + context_us * context_tokens) -
           std::min(std::max(saved, 0.0), shared_us);
}

void StepCost::prepare() {
    const auto shares = expert_shares(experts, experts_per_token);
    shares_ = std::make_shared<const std::vector<double>>(shares);
}

double StepCost::experts_read(double tokens) const {
    return (*shares_)[std::min(size_t(tokens), shares_->size() - 1)];
}

double StepCost::step_us(double tokens, double pairs, double context_tokens, double decodes) const {
    if (has_fit)
        return fit.one(tokens, pairs, context_tokens, decodes);
    double flops = tokens * flops_per_token + pairs * flops_per_pair;
    flops += (decodes + (tokens > decodes)) * head_flops_per_token;
    double moved = weight_bytes + context_tokens * kv_bytes_per_token;
    if (expert_bytes != 0.0)
        moved += experts_read(tokens) * expert_bytes;
    return overhead_us + 1e6 * std::max(flops / flops_per_s, moved / bytes_per_s);
}

double StepCost::prefill_us(double begin, double end) const {
    const double pairs = (end * (end + 1) - begin * (begin + 1)) / 2;
    if (has_fit)
        return (end - begin) * fit.prefill.mean_slope + pairs * fit.pair_us;
    const double flops = (end - begin) * flops_per_token + pairs * flops_per_pair;
    return 1e6 * flops / flops_per_s;
}

double StepCost::decode_us(double context_tokens) const {
    if (has_fit)
        return fit.decode.mean_slope + context_tokens * fit.context_us;
    const double each = flops_per_token + head_flops_per_token;
    const double flops = (each + context_tokens * flops_per_pair) / flops_per_s;
    const double moved = context_tokens * kv_bytes_per_token / bytes_per_s;
    return 1e6 * std::max(flops, moved);
}

} // namespace sagec
