// Which instances may have something to say: runtime/alarms.py.
#include "alarms.h"

namespace sagec {

Alarms::Alarms(i32 instances) : awake_(instances, 1), set_(instances), num_awake_(instances) {}

void Alarms::wake(i32 instance) {
    num_awake_ += !awake_[instance];
    awake_[instance] = 1;
}

void Alarms::set(i32 instance, std::optional<i64> at_us) {
    num_awake_ -= awake_[instance];
    awake_[instance] = 0;
    if (at_us && set_[instance] != at_us)
        heap_.push({*at_us, instance});
    set_[instance] = at_us;
}

const std::vector<i32> &Alarms::due(i64 now_us) {
    for (auto next = next_us(); next && *next <= now_us; next = next_us()) {
        const i32 instance = heap_.top().second;
        heap_.pop();
        set_[instance].reset();
        wake(instance);
    }
    due_.clear();
    const i32 count = static_cast<i32>(awake_.size());
    for (i32 at = 0; at < count && static_cast<i32>(due_.size()) < num_awake_; ++at) {
        if (awake_[at])
            due_.push_back(at);
    }
    return due_;
}

std::optional<i64> Alarms::next_us() {
    // An entry counts while it is what its instance said last.
    while (!heap_.empty() && set_[heap_.top().second] != heap_.top().first)
        heap_.pop();
    if (heap_.empty())
        return std::nullopt;
    return heap_.top().first;
}

} // namespace sagec
