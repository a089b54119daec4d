// RUN: sagec opt --split-input-file --verify-diagnostics --parsing-diagnostics %s | filecheck %s

// A graph's values stay in it.
// CHECK: error: nothing here defines %nobody
// CHECK: | {{ *}}%end = pd.decode %nobody : !pd.kv<2>
// CHECK-NEXT: | {{ *}}^~~~~~~
pd.graph @a {
  %end = pd.decode %nobody : !pd.kv<2>
}
%nobody = pd.resident on @d0 ["a": context 1, "b": context 1]

// -----

// Where nothing above says the type of a value, its use must.
// CHECK: error: %below is not defined above
// CHECK: say its type at the end, after ':'
pd.graph @a {
  %end = pd.decode %below
  %below = pd.resident on @d0 ["a": context 1]
}

// -----

// CHECK: error: SSA value %a is already defined
%a = pd.requests []
%a = pd.requests []

// -----

// CHECK: error: operand is used with type !pd.kv<1>, but has been previously used or defined with type !pd.kv<2>
%a = pd.resident on @d0 ["a": context 1, "b": context 1]
%b = pd.preempt %a [] : !pd.kv<1>

// -----

// What a graph says is declared.
// CHECK: error: no 'polcy' here
// CHECK: there are: policy, mode, now, round, horizon, step_prompt_tokens
pd.graph @a {polcy = "fifo"} {}

// -----

// CHECK: error: pd.graph: 'mode' is "mixed"
// CHECK: one of: strict, time-share, hybrid
pd.graph @a {mode = "mixed"} {}

// -----

// CHECK: error: pd.graph: 'now' is -1
// CHECK: 0 or more
pd.graph @a {now = -1} {}

// -----

// CHECK: error: expected the graph's name, @name
pd.graph a {}

// -----

// Graphs and phases are one block that ends with pd.yield.
// CHECK: error: pd.graph @a must end with pd.yield
"pd.graph"() <{sym_name = "a"}> ({
  %w = "pd.requests"() <{ids = #pd.names<>}> : () -> !pd.wave<0>
}) : () -> ()

// -----

// CHECK: error: pd.graph @a has block arguments
// CHECK: requests come in by pd.requests and pd.resident
"pd.graph"() <{sym_name = "a"}> ({
^bb0(%w: !pd.wave<1>):
  "pd.yield"() : () -> ()
}) : () -> ()

// -----

// CHECK: error: Region 'body' at position 0 expected a single block, but got 2 blocks
pd.graph @a {
  pd.yield
^second:
  pd.yield
}

// -----

// CHECK: error: 'pd.yield' expects parent op to be one of 'pd.graph', 'pd.phase'
pd.yield

// -----

// CHECK: error: 'pd.yield' must be the last operation in its parent block
pd.graph @a {
  pd.yield
  pd.yield
}

// -----

// CHECK: error: 'pd.phase' expects parent op 'pd.graph'
pd.graph @a {
  pd.phase prefill {
    pd.phase prefill {}
  }
}

// -----

// CHECK: error: Expected one of 'decode', 'prefill' as the phase
pd.graph @a {
  pd.phase both {}
}

// -----

// CHECK: error: pd.phase: 'both' is no phase
// CHECK: one of: prefill, decode
pd.graph @a {
  "pd.phase"() <{phase = "both"}> ({
    pd.yield
  }) : () -> ()
}

// -----

// CHECK: error: pd.phase yields nothing, but its results are !pd.kv<1>
// CHECK: both must be the same
pd.graph @a {
  %p = pd.phase decode {} : !pd.kv<1>
}

// -----

// Types say how many requests there are.
// CHECK: error: 16777217 requests are too many
// CHECK: 16777216 at most
%w = pd.requests [] : !pd.wave<16777217>

// -----

// CHECK: error: the type is !pd.wave<2>, but the rows make it !pd.wave<1>
%w = pd.requests ["a": prompt 1] : !pd.wave<2>

// -----

// CHECK: error: pd.requests: the result is !pd.wave<2>, but 1 rows make it !pd.wave<1>
%w = "pd.requests"() <{ids = #pd.names<"a">, prompt = #pd.column<1>}> : () -> !pd.wave<2>

// -----

// Rows: what is missing, unknown, twice or of another kind.
// CHECK: error: row "b" lacks 'prompt': tokens to compute before the first is sampled
// CHECK: | {{ *}}"b": generate 3
// CHECK-NEXT: | {{ *}}^
%w = pd.requests [
  "a": prompt 1,
  "b": generate 3
]

// -----

// CHECK: error: no field 'promt'
// CHECK: there are: adapter, arrived, cached
%w = pd.requests ["a": promt 1]

// -----

// CHECK: error: 'prompt' is given twice
%w = pd.requests ["a": prompt 1 prompt 2]

// -----

// CHECK: error: expected an integer after 'prompt', not "1"
%w = pd.requests ["a": prompt "1"]

// -----

// CHECK: error: expected an integer after 'prompt', not 1.5
%w = pd.requests ["a": prompt 1.5]

// -----

// CHECK: error: 9223372036854775808 does not fit 64 bits
%w = pd.requests ["a": prompt 9223372036854775808]

// -----

// CHECK: error: expected 'tenant' in quotes, not blue
%w = pd.requests ["a": prompt 1 tenant blue]

// -----

// CHECK: error: expected a symbol, @name, after 'on', not "p0"
%w = pd.requests ["a": prompt 1 on "p0"]

// -----

// CHECK: error: expected a symbol, @name, after 'on'
// CHECK: names of other characters stand in quotes: @"a-b"
%w = pd.requests ["a": prompt 1 on @p-0]

// -----

// CHECK: error: expected '[' after 'prefix', not 7
%w = pd.requests ["a": prompt 1 prefix 7]

// -----

// CHECK: error: expected ',' or ']', not 8
%w = pd.requests ["a": prompt 1 prefix [7 8]]

// -----

// CHECK: error: expected a request's id in quotes, not a
%w = pd.requests [a: prompt 1]

// -----

// CHECK: error: the string does not end on its line
%w = pd.requests ["a: prompt 1]

// -----

// CHECK: error: Invalid escape sequence: \q
%w = pd.requests ["a\q": prompt 1]

// -----

// CHECK: error: the string is not UTF-8
%w = pd.requests ["\FF": prompt 1]

// -----

// CHECK: error: expected a field, ',' or ']', not prompt
%w = pd.requests ["a" prompt 1]

// -----

// CHECK: error: expected ',' or ']', not "b"
%w = pd.requests ["a": prompt 1 "b": prompt 2]

// -----

// CHECK: error: expected ']' or more, but the text ends
%w = pd.requests ["a": prompt 1,

// -----

// CHECK: error: expected '[' before the rows
%w = pd.requests "a"

// -----

// CHECK: error: pd.requests: request "a" is named twice
// CHECK: ids are unique
%w = pd.requests ["a": prompt 1, "a": prompt 2]

// -----

// Columns: all have a row for each id.
// CHECK: error: no column 'promt'
// CHECK: there are: ids, prompt, generate
%w = pd.requests {ids = #pd.names<"a">, promt = #pd.column<1>}

// -----

// CHECK: error: the columns need ids, a #pd.names<...> with a name a row
%w = pd.requests {prompt = #pd.column<1>}

// -----

// CHECK: error: pd.requests: column 'prompt' has 2 rows where the op has 1
%w = pd.requests {ids = #pd.names<"a">, prompt = #pd.column<1, 2>}

// -----

// CHECK: error: pd.requests: column 'prompt' is missing: tokens to compute before the first is sampled
%w = pd.requests {ids = #pd.names<"a">}

// -----

// CHECK: error: pd.requests: 'prompt' must be a #pd.column, not a #pd.names
%w = pd.requests {ids = #pd.names<"a">, prompt = #pd.names<"1">}

// -----

// CHECK: error: pd.leave: column 'verdict' holds code 7
// CHECK: codes are in [0, 5)
pd.leave {ids = #pd.names<"a">, verdict = #pd.column<7>}

// -----

// CHECK: error: pd.resident: column 'arriving' holds code 2
// CHECK: codes are in [0, 2)
%r = pd.resident {ids = #pd.names<"a">, context = #pd.column<1>, on = #pd.words<"d0" : 0>, arriving = #pd.column<2>}

// -----

// CHECK: error: pd.requests: 'ids' must be a #pd.names, a name a row
%w = "pd.requests"() : () -> !pd.wave<0>

// -----

// CHECK: error: pd.resident: "b" lacks 'on': instance that holds its KV
%r = pd.resident {ids = #pd.names<"a", "b">, context = #pd.column<1, 1>, on = #pd.words<"d0", "" : 0, 1>}

// -----

// Attributes.
// CHECK: error: a code of 0 to 2
// CHECK: there are 2 words, codes are in [0, 2)
pd.leave {ids = #pd.words<"a", "b" : 0, 2>}

// -----

// CHECK: error: expected "0x" and the bytes of int64 values in hexadecimal
kv.evict @d0 #pd.column<"0x0102">

// -----

// CHECK: error: expected an integer
kv.evict @d0 #pd.column<1,>

// -----

// CHECK: error: 99999999999999999999 does not fit 64 bits
kv.evict @d0 #pd.column<99999999999999999999>

// -----

// CHECK: error: offsets ascend from 0 to 1, the values
%w = pd.requests {ids = #pd.names<"a">, prompt = #pd.column<1>, prefix = #pd.lists<"0x00000000000000000200000000000000", "0x0700000000000000">}

// -----

// CHECK: error: expected a string in quotes
pd.leave {ids = #pd.names<"a", b>}

// -----

// Values that make no sense.
// CHECK: error: pd.requests: "b": prompt 0
// CHECK: 1 or more (tokens to compute before the first is sampled)
%w = pd.requests ["a": prompt 1, "b": prompt 0]

// -----

// CHECK: error: pd.requests: "a": generate 0
// CHECK: 1 or more
%w = pd.requests ["a": prompt 1 generate 0]

// -----

// CHECK: error: pd.requests: "a": chunk -1
// CHECK: 0 or more
%w = pd.requests ["a": prompt 1 chunk -1]

// -----

// The last token of a prompt is computed even where the cache has it.
// CHECK: error: pd.requests: "a": computed 16 and cached 80 of prompt 96
// CHECK: the last token is always computed, for its logits
%w = pd.requests ["a": prompt 96 computed 16 cached 80]

// -----

// CHECK: error: pd.requests: "a": computed 9223372036854775807 and cached 1 of prompt 96
%w = pd.requests ["a": prompt 96 computed 9223372036854775807 cached 1]

// -----

// CHECK: error: pd.resident: "a": context 0
// CHECK: 1 or more (tokens of KV it has)
%r = pd.resident on @d0 ["a": context 0]

// -----

// Decisions.
// CHECK: error: row "a" lacks admit or defer or reject or preempt or swap: what the strategy says
%w = pd.requests ["a": prompt 1]
%g = pd.decide %w ["a": rank 1]

// -----

// CHECK: error: 'verdict' is given twice
%w = pd.requests ["a": prompt 1]
%g = pd.decide %w ["a": admit defer]

// -----

// CHECK: error: pd.decide: 2 rows say something of !pd.wave<1>
// CHECK: there are 1
%w = pd.requests ["a": prompt 1]
%g = pd.decide %w ["a": admit, "b": defer]

// -----

// CHECK: error: pd.decide: of !pd.wave<1> it gives !pd.wave<1>, not !pd.wave<0>
%w = pd.requests ["a": prompt 1]
%g = "pd.decide"(%w) <{ids = #pd.names<"a">, verdict = #pd.column<1>}> : (!pd.wave<1>) -> !pd.wave<0>

// -----

// CHECK: error: pd.decide takes a !pd.wave or a !pd.kv, not i32
pd.decide %w ["a": admit] : i32

// -----

// CHECK: error: pd.leave: "a" is admitted
// CHECK: who leaves is defer, reject, preempt or swap
pd.leave ["a": admit]

// -----

// CHECK: error: pd.turns: "d0": steps -1
// CHECK: 0 or more (steps it may compute; 0: none)
pd.turns ["d0": steps -1]

// -----

// CHECK: error: pd.turns: instance "d0" is named twice
pd.turns ["d0": steps 1, "d0": steps 2]

// -----

// CHECK: error: pd.preempt: "a": defer
// CHECK: it is preempt or swap
%r = pd.resident on @d0 ["a": context 1]
%s = pd.preempt %r ["a": defer on @d0]

// -----

// CHECK: error: pd.preempt: 2 rows say something of !pd.kv<1>
// CHECK: there are 1
%r = pd.resident on @d0 ["a": context 1]
%s = pd.preempt %r ["a": swap on @d0, "b": swap on @d0]

// -----

// CHECK: error: pd.transfer: "a" goes from @d0 to itself
%r = pd.resident on @d0 ["a": context 1]
%s = pd.transfer %r source @d0 target @d0 ["a"]

// -----

// Prefill and decode.
// CHECK: error: the result is a !pd.kv, not !pd.wave<1>
%w = pd.requests ["a": prompt 1]
%k = pd.prefill %w : !pd.wave<1>

// -----

// CHECK: error: pd.prefill: of !pd.wave<1> it gives !pd.kv<1>, not !pd.kv<2>
%w = pd.requests ["a": prompt 1]
%k = "pd.prefill"(%w) : (!pd.wave<1>) -> !pd.kv<2>

// -----

// CHECK: error: pd.prefill: chunk 0
// CHECK: 1 or more
%w = pd.requests ["a": prompt 1]
%k = pd.prefill %w chunk 0

// -----

// CHECK: error: pd.prefill: 'on' names instances for 2 rows
// CHECK: there are 1
%w = pd.requests ["a": prompt 1]
%k = pd.prefill %w on [@p0, @p1]

// -----

// CHECK: error: expected @instance, [@a, @b, ...] or #pd.words<...> after 'on'
%w = pd.requests ["a": prompt 1]
%k = pd.prefill %w on "p0"

// -----

// CHECK: error: pd.prefill: bounds of 2 rows
// CHECK: there are 1
%w = pd.requests ["a": prompt 1]
%k = pd.prefill %w bounds [[0, 1], [0, 1]]

// -----

// CHECK: error: pd.prefill: row 0 has bounds [0, 64, 64]
// CHECK: they ascend and are two or more: where its chunks begin, and the end
%w = pd.requests ["a": prompt 64]
%k = pd.prefill %w bounds [[0, 64, 64]]

// -----

// CHECK: error: pd.prefill: row 1 has bounds []
%w = pd.requests ["a": prompt 1, "b": prompt 1]
%k = pd.prefill %w bounds [[0, 1], []]

// -----

// CHECK: error: pd.join takes !pd.kv, not !pd.wave<1>
%w = pd.requests ["a": prompt 1]
%k = pd.join %w

// -----

// CHECK: error: pd.join: of 0 rows it gives !pd.kv<0>, not !pd.kv<1>
%k = "pd.join"() : () -> !pd.kv<1>

// -----

// CHECK: error: 1 types for 2 values
%r = pd.resident on @d0 []
%k = pd.join %r, %r : !pd.kv<0>

// -----

// CHECK: error: expected a value, %name
%k = pd.join

// -----

// CHECK: error: pd.decode: of !pd.kv<0> it gives the same type, not !pd.kv<1>
%r = pd.resident on @d0 []
%k = "pd.decode"(%r) : (!pd.kv<0>) -> !pd.kv<1>

// -----

// CHECK: error: pd.decode: steps -1
// CHECK: 0 (all) or more
%r = pd.resident on @d0 []
%k = pd.decode %r steps -1

// -----

// Steps.
// CHECK: error: pd.steps: 'num_steps' is missing: engine calls
pd.steps @p0 {max_step_tokens = 1} []

// -----

// CHECK: error: no row "b" in the table above
pd.steps @p0 {num_steps = 1, max_step_tokens = 8} ["a": prompt 4 blocks 1] chunks {0: "b" [0, 4)}

// -----

// CHECK: error: expected ')', not ]
pd.steps @p0 {num_steps = 1, max_step_tokens = 8} ["a": prompt 4 blocks 1] chunks {0: "a" [0, 4]}

// -----

// CHECK: error: expected ',', ';' or '}' after a chunk, not 1
pd.steps @p0 {num_steps = 2, max_step_tokens = 8} ["a": prompt 4 blocks 1] chunks {0: "a" [0, 4) 1: "a" [0, 4)}

// -----

// CHECK: error: pd.steps: chunk_step 1
// CHECK: it is in [0, 1)
pd.steps @p0 {num_steps = 1, max_step_tokens = 8} ["a": prompt 4 blocks 1] chunks {1: "a" [0, 4)}

// -----

// CHECK: error: pd.steps: chunk_row 3
// CHECK: it is in [0, 1)
pd.steps @p0 {num_steps = 1, max_step_tokens = 8} ["a": prompt 4 blocks 1] chunks {
  chunk_step = #pd.column<0>, chunk_row = #pd.column<3>, chunk_begin = #pd.column<0>, chunk_end = #pd.column<4>
}

// -----

// CHECK: error: pd.steps: chunk columns of 1, 0, 0, 0 rows
// CHECK: all have the same
pd.steps @p0 {num_steps = 1, max_step_tokens = 8} ["a": prompt 4 blocks 1] chunks {chunk_step = #pd.column<0>}

// -----

// CHECK: error: no column 'chunk_sep' here
// CHECK: there are: chunk_step, chunk_row, chunk_begin, chunk_end
pd.steps @p0 {num_steps = 1, max_step_tokens = 8} ["a": prompt 4 blocks 1] chunks {chunk_sep = #pd.column<0>}

// -----

// CHECK: error: pd.steps: chunks must be in the order of their steps
pd.steps @p0 {num_steps = 2, max_step_tokens = 8} ["a": prompt 4 blocks 1] chunks {1: "a" [0, 2); 0: "a" [2, 4)}

// -----

// CHECK: error: pd.steps: step 0: "a": chunk [2, 2) is empty
// CHECK: begin is before end
pd.steps @p0 {num_steps = 1, max_step_tokens = 8} ["a": prompt 4 blocks 1] chunks {0: "a" [2, 2)}

// -----

// CHECK: error: pd.steps: step 0: "a": chunk [0, 5) ends behind its prompt
pd.steps @p0 {num_steps = 1, max_step_tokens = 8} ["a": prompt 4 blocks 1] chunks {0: "a" [0, 5)}

// -----

// A token is computed once.
// CHECK: error: pd.steps: step 1: "a": chunk [2, 4) begins before the end of the chunk before it
pd.steps @p0 {num_steps = 2, max_step_tokens = 8} ["b": prompt 3 blocks 1, "a": prompt 4 blocks 1] chunks {0: "a" [0, 3), "b" [0, 3); 1: "a" [2, 4)}

// -----

// CHECK: error: pd.steps: step_us has 2 rows
// CHECK: it has one a step, 1
pd.steps @p0 {num_steps = 1, max_step_tokens = 8} [] estimates {step_us = #pd.column<1, 2>}

// -----

// CHECK: error: 'step_us' must be a #pd.column, not a #pd.names
pd.steps @p0 {num_steps = 1, max_step_tokens = 8} [] estimates {step_us = #pd.names<"1">}
