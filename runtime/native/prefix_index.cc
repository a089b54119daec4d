// The prefix cache of a simulated instance; see runtime/kv/prefix_index.py and policies/lru.py.
#include "prefix_index.h"

#include <algorithm>
#include <functional>

namespace sagec {

namespace {

constexpr i64 SPARE = 64; // entries of the heap that may be stale, however few blocks there are

} // namespace

Lease PrefixIndex::lookup(const i64 *hashes, i64 count) {
    Lease found;
    for (; found.blocks < count && has(hashes[found.blocks]); ++found.blocks) {
        found.last = hashes[found.blocks];
        Block &block = blocks_[found.last];
        block.rank = next_rank_++;
        block.is_queued = false;
        pin(block);
    }
    return found;
}

void PrefixIndex::insert(Lease &lease, const i64 *hashes, i64 count) {
    for (i64 i = 0; i < count; ++i) {
        if (!has(hashes[i]))
            enter(hashes[i], lease.last);
        lease.last = hashes[i];
        pin(blocks_[lease.last]);
    }
    lease.blocks += count;
}

void PrefixIndex::release(const Lease &lease) {
    i64 hash = lease.last;
    for (i64 i = 0; i < lease.blocks; ++i) {
        Block &block = blocks_[hash];
        if (!--block.pins) {
            --pinned_;
            queue(hash);
        }
        hash = block.parent;
    }
}

void PrefixIndex::evict(i64 count) {
    for (; count > 0; --count) {
        const i64 hash = victim();
        if (hash == NOBODY)
            return;
        leave(hash);
    }
}

std::pair<std::vector<i64>, std::vector<i64>> PrefixIndex::take_changes() {
    return {take(stored_), take(evicted_)};
}

bool PrefixIndex::has(i64 hash) const {
    return hash < static_cast<i64>(blocks_.size()) && blocks_[hash].is_cached;
}

void PrefixIndex::enter(i64 hash, i64 parent) {
    if (hash >= static_cast<i64>(blocks_.size()))
        blocks_.resize(std::max<std::size_t>(2 * blocks_.size(), hash + 1));
    Block &block = blocks_[hash];
    block.parent = parent;
    block.rank = next_rank_++;
    block.is_cached = true;
    if (parent != NOBODY)
        ++blocks_[parent].children;
    ++size_;
    note(hash, stored_, evicted_);
}

void PrefixIndex::leave(i64 hash) {
    Block &block = blocks_[hash];
    block.is_cached = false;
    --size_;
    note(hash, evicted_, stored_);
    if (block.parent == NOBODY)
        return;
    --blocks_[block.parent].children;
    queue(block.parent);
}

void PrefixIndex::queue(i64 hash) {
    Block &block = blocks_[hash];
    if (!block.may_go() || block.is_queued)
        return;
    block.is_queued = true;
    heap_.emplace_back(block.rank, hash);
    std::push_heap(heap_.begin(), heap_.end(), std::greater<>());
    if (static_cast<i64>(heap_.size()) <= 2 * size_ + SPARE)
        return;
    const auto stale = [this](const Ranked &entry) { return is_stale(entry); };
    heap_.erase(std::remove_if(heap_.begin(), heap_.end(), stale), heap_.end());
    std::make_heap(heap_.begin(), heap_.end(), std::greater<>());
}

i64 PrefixIndex::victim() {
    while (!heap_.empty()) {
        const Ranked first = heap_.front();
        std::pop_heap(heap_.begin(), heap_.end(), std::greater<>());
        heap_.pop_back();
        if (is_stale(first))
            continue;
        Block &block = blocks_[first.second];
        block.is_queued = false;
        if (block.may_go())
            return first.second;
    }
    return NOBODY;
}

// Whether the block was used since, or has gone.
bool PrefixIndex::is_stale(const Ranked &entry) const {
    const Block &block = blocks_[entry.second];
    return !block.is_queued || block.rank != entry.first;
}

// A change that undoes one that nobody was told of cancels it.
void PrefixIndex::note(i64 hash, std::vector<i64> &to, std::vector<i64> &undone) {
    Block &block = blocks_[hash];
    if (block.place != NOBODY) {
        undone[block.place] = NOBODY;
        block.place = NOBODY;
        return;
    }
    block.place = static_cast<i32>(to.size());
    to.push_back(hash);
}

std::vector<i64> PrefixIndex::take(std::vector<i64> &noted) {
    std::vector<i64> taken;
    taken.reserve(noted.size());
    for (const i64 hash : noted) {
        if (hash == NOBODY)
            continue; // undone
        blocks_[hash].place = NOBODY;
        taken.push_back(hash);
    }
    noted.clear();
    return taken;
}

} // namespace sagec
