// Who has KV of whom: runtime/kv/directory.py.
#pragma once

#include <functional>
#include <unordered_map>
#include <vector>

#include "types.h"

namespace sagec {

// The prefix caches as instances tell of them. Blocks are dense numbers, each behind the same block
// in every prompt, so that what an instance has of a prompt need not be kept: it is counted where
// somebody asks.
class Directory {
  public:
    // The whole blocks of a prompt and so much output behind it, as far as anybody may have them.
    using BlocksOf = std::function<std::vector<i64>(i32 request, i64 output_tokens)>;

    // block_tokens: of each instance, 0 where nobody looks for prefixes. blocks: how many there are
    // in prompts. blocks_of: none where nobody caches.
    Directory(std::vector<Request> &requests, std::vector<i64> block_tokens, i64 blocks, BlocksOf blocks_of);

    // A request waits; its output so far is part of what is to be computed.
    void wait(i32 request, i64 output_tokens);
    void changed(i32 instance, const std::vector<i64> &stored, const std::vector<i64> &evicted);
    bool has_caches() const { return size_ > 0; }
    // Leading tokens that the instance has of a prompt that it has not begun.
    i64 cached_tokens(i32 request, i64 prompt_tokens, i32 instance) const;

  private:
    bool are_told(const Request &asked, i64 output_tokens) const;
    bool has(i32 instance, i64 block) const;

    std::vector<Request> &requests_;
    std::vector<i64> block_tokens_;
    BlocksOf blocks_of_;
    std::unordered_map<i32, std::vector<i64>> others_; // of requests, blocks that were asked for
    std::vector<std::vector<char>> held_;              // [instance][block]
    i64 size_ = 0;                                     // of a block, 0: nobody looks
};

} // namespace sagec
