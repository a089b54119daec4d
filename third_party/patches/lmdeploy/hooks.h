// What each patch hooks. A seam is hooked once; where two patches care for one, the second's hook calls
// a function of the first's (declared here).
#pragma once

#include "abi.h"
#include "library.h"

namespace sagec::tm {

std::vector<Hook> kv_manager_hooks(); // 0001: Erase, Evict
std::vector<Hook> prefix_hooks(); // 0002: PrefixMatch, CachePrompt, CacheGeneration, BlockTrie::Cache, Verify
std::vector<Hook> scheduler_hooks(); // 0003: Initialize, Materialize, CountRequiredBlocks, Finish
std::vector<Hook> comm_hooks();      // 0004: ncclAllReduce, the other collectives, groups of them

std::vector<Hook> all_hooks(); // of the four

// Of selftest.cc: are the layouts those of abi.h? "" or which fact does not hold. TurboMind's own
// functions are called, on objects in host memory that nobody else knows.
std::string test_layouts();

// Of 0001: evicts, and tells of it as where TurboMind does it. The rank's blocks are locked.
void evict_blocks(BlockManager &blocks, int count);
// Of 0002: the session is gone, and with it what was said of its blocks.
void forget_stored(std::uint64_t session);

} // namespace sagec::tm
