// 0002: what the prefix cache finds and stores, and a guard for what it may store.
//
// Hooks SequenceManager::PrefixMatch (before the look-up sequences may begin with KV from elsewhere;
// after it, what was found is told), CachePrompt and CacheGeneration (which know the rank),
// BlockTrie::Cache, and BlockManager::Verify, which says what a preempted sequence still has.
//
// The guard. TurboMind publishes all blocks of a prompt but the last when its first chunk is computed.
// As long as its own scheduler decides, nobody overtakes that prompt; with an order from outside, a
// sequence with the same prefix may, and would attend to KV that was never written. The same happens
// in stock TurboMind when a half-prefilled prompt is cancelled. So only computed blocks are published,
// for everybody. The guard also keeps TurboMind from two of its own assertions, which end the process:
// that a sequence has blocks for all its tokens (not where a decision computes a chunk alone), and that
// it is not preempted (when it is cancelled then).
#include <algorithm>
#include <mutex>
#include <unordered_map>

#include "hand_over.h"
#include "hooks.h"
#include "instance.h"

namespace sagec::tm {

namespace {

using Published = std::tuple<BlockIds, UniqueIds>;

Original<void(SequenceManager *, Sequences &)> original_prefix_match;
Original<void(SequenceManager *, const Sequences &, int)> original_cache_prompt;
Original<void(SequenceManager *, const Sequence &)> original_cache_generation;
Original<Published(BlockTrie *, const Sequence &, const Tokens &)> original_trie_cache;
Original<int(BlockManager *, const BlockIds &, const UniqueIds &)> original_verify; // not called

thread_local bool speaks = false; // rank 0 of an instance is publishing

// How many of a session's first blocks are known to be in the trie, and which the last of them is: after
// a preemption it is another.
struct Stored {
    std::size_t num_blocks = 0;
    std::uint64_t last_uid = 0;
};
std::mutex stored_mutex;
// Never destroyed: engines may still run when the process ends.
auto &stored_blocks = *new std::unordered_map<std::uint64_t, Stored>;

// Remembers that the blocks are stored: how many of them are news.
std::size_t remember_stored(std::uint64_t session, const UniqueIds &uids) {
    std::lock_guard<std::mutex> lock(stored_mutex);
    Stored &stored = stored_blocks[session];
    const bool same = stored.num_blocks == 0 ||
                      (stored.num_blocks <= uids.size() && uids[stored.num_blocks - 1] == stored.last_uid);
    const std::size_t news = same ? uids.size() - stored.num_blocks : uids.size();
    if (news)
        stored = {uids.size(), uids.back()};
    return news;
}

void tell_of_storing(Instance &instance, std::uint64_t session, const UniqueIds &uids) {
    const std::size_t news = uids.empty() ? 0 : remember_stored(session, uids);
    if (!news)
        return;
    instance.count(&sagec_tm_counters::stored_blocks, static_cast<std::int64_t>(news));
    const auto name = static_cast<std::int64_t>(session), count = static_cast<std::int64_t>(uids.size());
    instance.events.write(SAGEC_TM_STORED, {name, count}, {uids.begin(), uids.end()});
}

// The first `count` blocks of a sequence are published, with the tokens in them.
Published publish(BlockTrie *trie, const Sequence &sequence, const Tokens &tokens, int count) {
    const int num_stock = static_cast<int>(sequence.blocks.size()) - 1;
    if (count <= 0)
        return {};
    if (count == num_stock && tokens.size() <= sequence.blocks.size() * trie->block_seq_len)
        return original_trie_cache(trie, sequence, tokens);
    Sequence first{}; // TurboMind leaves the last block out: so one more
    first.id = sequence.id;
    first.status = sequence.status;
    first.blocks.assign(sequence.blocks.begin(), sequence.blocks.begin() + count + 1);
    first.block_unique_ids.assign(sequence.block_unique_ids.begin(),
                                  sequence.block_unique_ids.begin() + count + 1);
    return original_trie_cache(trie, first,
                               {tokens.begin(), tokens.begin() + count * std::int64_t(trie->block_seq_len)});
}

Published trie_cache(BlockTrie *trie, const Sequence &sequence, const Tokens &tokens) {
    if (sequence.status == kCached) // it owns none of its blocks: others may have them already
        return {};
    const auto instance = instance_of(sequence.id);
    const int block_tokens = static_cast<int>(trie->block_seq_len);
    const int num_stock = std::min(static_cast<int>(sequence.blocks.size()) - 1,
                                   static_cast<int>(tokens.size()) / block_tokens);
    const int num_computed = std::min(num_stock, sequence.cache_len / block_tokens);
    const bool is_guarded = !instance || instance->options.guard;
    const Published published = publish(trie, sequence, tokens, is_guarded ? num_computed : num_stock);
    if (instance && speaks) {
        if (is_guarded && num_stock > num_computed)
            instance->count(&sagec_tm_counters::guarded_blocks, num_stock - num_computed);
        tell_of_storing(*instance, sequence.id, std::get<1>(published));
    }
    return published;
}

void cache_prompt(SequenceManager *manager, const Sequences &sequences, int num_active) {
    speaks = manager->rank == 0;
    original_cache_prompt(manager, sequences, num_active);
    speaks = false;
}

void cache_generation(SequenceManager *manager, const Sequence &sequence) {
    speaks = manager->rank == 0;
    original_cache_generation(manager, sequence);
    speaks = false;
}

void tell_of_matches(Instance &instance, const Sequences &unstarted) {
    for (const Sequence *sequence : unstarted) {
        if (!sequence->cache_len)
            continue;
        instance.count(&sagec_tm_counters::matched_tokens, sequence->cache_len);
        instance.events.write(SAGEC_TM_MATCHED,
                              {static_cast<std::int64_t>(sequence->id), sequence->cache_len});
    }
}

// How many of a sequence's first blocks still hold its KV. Stock ends the process where a later one does
// though an earlier one does not. But two sequences that computed one prefix each for itself get their
// blocks mixed in the trie: who is given the mixture and ends makes the later blocks of the first one
// newer than its earlier ones, and eviction goes by age.
int verify(BlockManager *manager, const BlockIds &ids, const UniqueIds &uids) {
    std::size_t valid = 0;
    while (valid < ids.size() && manager->blocks[ids[valid]].unique_id == uids[valid])
        ++valid;
    return static_cast<int>(valid);
}

void prefix_match(SequenceManager *manager, Sequences &sequences) {
    const auto instance = instance_numbered(number_of(sequences));
    if (!instance)
        return original_prefix_match(manager, sequences);
    import_staged(*instance, *manager, sequences);
    thread_local Sequences unstarted;
    unstarted.clear();
    if (manager->rank == 0 && manager->block_trie)
        std::copy_if(sequences.begin(), sequences.end(), std::back_inserter(unstarted),
                     [](const Sequence *sequence) { return sequence->cache_len == 0; });
    original_prefix_match(manager, sequences);
    tell_of_matches(*instance, unstarted);
}

} // namespace

void forget_stored(std::uint64_t session) {
    std::lock_guard<std::mutex> lock(stored_mutex);
    stored_blocks.erase(session);
}

std::vector<Hook> prefix_hooks() {
    return {{names::kPrefixMatch, reinterpret_cast<void *>(prefix_match), original_prefix_match.slot()},
            {names::kCachePrompt, reinterpret_cast<void *>(cache_prompt), original_cache_prompt.slot()},
            {names::kCacheGeneration, reinterpret_cast<void *>(cache_generation),
             original_cache_generation.slot()},
            {names::kTrieCache, reinterpret_cast<void *>(trie_cache), original_trie_cache.slot()},
            {names::kVerify, reinterpret_cast<void *>(verify), original_verify.slot()}};
}

} // namespace sagec::tm
