// What each patch hooks. A seam is hooked once; where two patches care for one, the second's hook calls
// a function of the first's (declared here).
#pragma once

#include "abi.h"
#include "library.h"

namespace sagec::tm {

std::vector<Hook> kv_manager_hooks(); // 0001: Erase, UpdateAndSetUnlock, Evict, Allocate
std::vector<Hook> prefix_hooks();     // 0002: PrefixMatch, CachePrompt, CacheGeneration, BlockTrie::Cache
std::vector<Hook> scheduler_hooks();  // 0003: Initialize, Materialize, CountRequiredBlocks, Finish
std::vector<Hook> comm_hooks();       // 0004: ncclAllReduce and the other collectives

// Of 0001, called by 0002 before TurboMind looks for prefixes: sequences that KV is staged for begin
// with it. Blocks evicted for that leave the trie at once, for it is about to be searched.
void import_staged(SequenceManager &manager, Sequences &sequences);

} // namespace sagec::tm
