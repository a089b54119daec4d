#include "event_log.h"

#include <algorithm>
#include <chrono>

namespace sagec::tm {

EventLog::EventLog(std::int64_t capacity) { words_.reserve(static_cast<std::size_t>(capacity)); }

void EventLog::write(std::int64_t kind, std::initializer_list<std::int64_t> fields,
                     const std::vector<std::int64_t> &more) {
    {
        std::lock_guard lock(mutex_);
        if (closed_)
            return;
        words_.push_back(kind);
        words_.push_back(static_cast<std::int64_t>(2 + fields.size() + more.size()));
        words_.insert(words_.end(), fields);
        words_.insert(words_.end(), more.begin(), more.end());
    }
    filled_.notify_one();
}

std::int64_t EventLog::read(std::int64_t *events, std::int64_t capacity, std::int64_t timeout_us) {
    constexpr std::int64_t kLongUs = std::int64_t{1} << 50; // 35 years; the clock has no room for more
    std::unique_lock lock(mutex_);
    filled_.wait_for(lock, std::chrono::microseconds(std::min(timeout_us, kLongUs)),
                     [&] { return closed_ || first_ < words_.size(); });
    auto end = first_;
    while (end < words_.size() && static_cast<std::int64_t>(end - first_) + words_[end + 1] <= capacity)
        end += static_cast<std::size_t>(words_[end + 1]);
    if (end == first_)
        return first_ < words_.size() ? -words_[first_ + 1] : 0;
    const auto num_words = static_cast<std::int64_t>(end - first_);
    std::copy_n(words_.begin() + static_cast<std::ptrdiff_t>(first_), num_words, events);
    first_ = end;
    if (2 * first_ >= words_.size()) { // so that a slow reader moves each word once on average
        words_.erase(words_.begin(), words_.begin() + static_cast<std::ptrdiff_t>(first_));
        first_ = 0;
    }
    return num_words;
}

void EventLog::close() {
    {
        std::lock_guard lock(mutex_);
        closed_ = true;
    }
    filled_.notify_all();
}

} // namespace sagec::tm
