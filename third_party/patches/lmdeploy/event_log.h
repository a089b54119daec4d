// Events of an instance on their way to its reader: a queue of int64s that grows with a slow reader.
#pragma once

#include <condition_variable>
#include <cstdint>
#include <initializer_list>
#include <mutex>
#include <vector>

namespace sagec::tm {

class EventLog {
  public:
    explicit EventLog(std::int64_t capacity); // int64s to begin with

    // kind, then the fields, then `more`; the size is put in between. Never waits for the reader.
    void write(std::int64_t kind, std::initializer_list<std::int64_t> fields,
               const std::vector<std::int64_t> &more = {});
    // As sagec_tm_read.
    std::int64_t read(std::int64_t *events, std::int64_t capacity, std::int64_t timeout_us);
    void close(); // wakes whoever reads, who still gets what is in it; nothing more is written

  private:
    std::mutex mutex_;
    std::condition_variable filled_;
    std::vector<std::int64_t> words_;
    std::size_t first_ = 0; // those before it are read
    bool closed_ = false;
};

} // namespace sagec::tm
