// Which instances may have something to say: runtime/alarms.py.
#pragma once

#include <functional>
#include <optional>
#include <queue>
#include <utility>
#include <vector>

#include "types.h"

namespace sagec {

// Instances say when something happens next, and nothing before unless told.
class Alarms {
  public:
    // Everybody is to be asked once.
    explicit Alarms(i32 instances);

    void wake(i32 instance);
    void set(i32 instance, std::optional<i64> at_us);
    // Whom to ask now, in the order of the instances; good until the next call.
    const std::vector<i32> &due(i64 now_us);
    bool is_anyone_awake() const { return num_awake_ > 0; }
    std::optional<i64> next_us();

  private:
    using Entry = std::pair<i64, i32>;

    std::vector<char> awake_;
    std::vector<std::optional<i64>> set_;
    std::priority_queue<Entry, std::vector<Entry>, std::greater<Entry>> heap_;
    std::vector<i32> due_;
    i32 num_awake_ = 0;
};

} // namespace sagec
