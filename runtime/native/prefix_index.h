// Which block of which prefix is cached, the least recently used to go first:
// runtime/kv/prefix_index.py of one tier, with runtime/kv/policies/lru.py.
#pragma once

#include <utility>
#include <vector>

#include "types.h"

namespace sagec {

// A cached prefix that somebody holds: its last block, and how many blocks it has.
struct Lease {
    i64 last = NOBODY;
    i64 blocks = 0;
};

// A tree of blocks, each named by its hash: a number from 0 on, few of which are missing. A block
// stands behind the same one in all prompts. Who looks a prefix up or inserts one holds it from
// then on, until `release`.
class PrefixIndex {
  public:
    i64 size() const { return size_; }
    i64 pinned() const { return pinned_; } // blocks that somebody holds

    Lease lookup(const i64 *hashes, i64 count);              // the longest cached prefix, used now
    void insert(Lease &lease, const i64 *hashes, i64 count); // behind those of `lease`
    void release(const Lease &lease);
    void evict(i64 count); // as many as may go

    // What is cached, and no longer cached, since this was asked last.
    std::pair<std::vector<i64>, std::vector<i64>> take_changes();

  private:
    // rank: of its last use, the least goes first. children: that are cached. place: where it is in
    // the list of those stored if it is cached, else of those evicted; NOBODY: nothing to tell.
    // is_queued: whether the heap has it with this rank.
    struct Block {
        i64 rank = 0, parent = NOBODY;
        i32 pins = 0, children = 0, place = NOBODY;
        bool is_cached = false, is_queued = false;
        bool may_go() const { return !pins && !children; }
    };
    using Ranked = std::pair<i64, i64>; // rank, block

    bool has(i64 hash) const;
    void pin(Block &block) { pinned_ += !block.pins++; }
    void enter(i64 hash, i64 parent);
    void leave(i64 hash);
    void queue(i64 hash); // let it go in its turn, if it may
    i64 victim();         // NOBODY: all are in use
    bool is_stale(const Ranked &entry) const;
    void note(i64 hash, std::vector<i64> &to, std::vector<i64> &undone);
    std::vector<i64> take(std::vector<i64> &noted);

    std::vector<Block> blocks_; // by hash
    std::vector<Ranked> heap_;  // the least first
    std::vector<i64> stored_, evicted_;
    i64 size_ = 0, pinned_ = 0, next_rank_ = 0;
};

} // namespace sagec
