// KV of a sequence to host memory and from there, for 0001 and 0002.
#pragma once

#include "abi.h"

namespace sagec::tm {

class Instance;

// A rank's part of a session that is being erased: copied where it is wanted. ERASED is the last that is
// heard of the session, when all ranks are done; EXPORTED comes before it. The rank's blocks are locked.
void export_erased(Instance &instance, const SequenceManager &manager, const Sequence &sequence);

// Sequences that KV is staged for begin with it, on all ranks or on none. Blocks evicted for that leave
// the prefix trie at once, for it is about to be searched. The rank's blocks are locked.
void import_staged(Instance &instance, SequenceManager &manager, const Sequences &sequences);

int num_free_blocks(const BlockManager &blocks); // with those that it has not asked memory for yet

} // namespace sagec::tm
