// RUN: sagec opt %s | sagec opt - | filecheck %s
// RUN: sagec opt --print-op-generic %s | sagec opt - | filecheck %s
// RUN: sagec opt --print-op-generic %s | filecheck %s --check-prefix=GENERIC

// The least: a graph of nothing. It ends with pd.yield, which the text may leave out.
// CHECK-LABEL: pd.graph @nothing {
// CHECK-NEXT: pd.yield
// CHECK-NEXT: }
pd.graph @nothing {}

// All that a graph can say.
// CHECK-LABEL: pd.graph @everything_said {policy = "slo-aware", mode = "time-share", now = 1834000, round = 42, horizon = 16, step_prompt_tokens = 128} {
// GENERIC: "pd.graph"() <{sym_name = "everything_said", round = 42 : i64, step_prompt_tokens = 128 : i64, policy = "slo-aware", mode = "time-share", now = 1834000 : i64, horizon = 16 : i64}> ({
pd.graph @everything_said { // a comment does not make the braces a body
  round = 42, step_prompt_tokens = 128, policy = "slo-aware", mode = "time-share", now = 1834000, horizon = 16} {
}

// A request has many fields; those at their default are not printed, and order does not matter.
// CHECK-LABEL: pd.graph @requests
pd.graph @requests {
  // CHECK: %full = pd.requests [
  // CHECK-NEXT: "chat-1": prompt 1024 generate 256 arrived 1830000 deadline 2030000 priority -1 ttft 200000 tpot 50000 model @tiny tenant "blue" session "s1" adapter "lora-7" samples 2 top_k 40 prefix [11, -12] cached 512 computed 16 chunk 64 on @p0 decode_on @d0 text "Hello \22you\22"
  // CHECK-NEXT: ] : !pd.wave<1>
  // GENERIC: "pd.requests"() <{ids = #pd.names<"chat-1">{{.*}}adapter = #pd.words<"lora-7" : 0>{{.*}}prefix = #pd.lists<[11, -12]>{{.*}} : () -> !pd.wave<1>
  %full = pd.requests [
    "chat-1": text "Hello \"you\"" decode_on @d0 on @p0 chunk 64 computed 16 cached 512 prefix [11, -12] top_k 40 samples 2
      adapter "lora-7" session "s1" tenant "blue" model @tiny tpot 50000 ttft 200000 priority -1
      deadline 2030000 arrived 1830000 generate 256 prompt 1024
  ]
  // CHECK: %few = pd.requests [
  // CHECK-NEXT: "a": prompt 7,
  // CHECK-NEXT: "b": prompt 8 priority 1,
  // CHECK-NEXT: "": prompt 9 text "x"
  // CHECK-NEXT: ] : !pd.wave<3>
  %few = pd.requests ["a": prompt 7 generate 2147483647 samples 1 prefix [], // comments may stand here
                      "b": prompt 8 priority 1, "": prompt 9 text "x"] : !pd.wave<3>
  // CHECK: %none = pd.requests [] : !pd.wave<0>
  %none = pd.requests []
  // A table may always be written as its columns; a short one prints as rows.
  // CHECK: %columns = pd.requests [
  // CHECK-NEXT: "a": prompt 7,
  // CHECK-NEXT: "b": prompt 8 tenant "blue"
  %columns = pd.requests {ids = #pd.names<"a", "b">, prompt = #pd.column<7, 8>, tenant = #pd.words<"", "blue" : 0, 1>}
}

// Requests that decode already. Where all are on one instance, it stands once.
// CHECK-LABEL: pd.graph @residents
pd.graph @residents {
  // CHECK: %one = pd.resident on @d0 [
  // CHECK-NEXT: "chat-0": context 811 remaining 40 arrived 1 deadline 2 priority 3 ttft 4 tpot 5 model @tiny tenant "t" session "s" adapter "a" arriving,
  // CHECK-NEXT: "chat-9": context 5
  // CHECK-NEXT: ] : !pd.kv<2>
  // GENERIC: "pd.resident"() {{.*}}arriving = #pd.column<1, 0>{{.*}}> : () -> !pd.kv<2>
  %one = pd.resident on @d0 [
    "chat-0": context 811 remaining 40 arriving arrived 1 deadline 2 priority 3 ttft 4 tpot 5 model @tiny tenant "t"
      session "s" adapter "a",
    "chat-9": context 5
  ]
  // CHECK: %two = pd.resident [
  // CHECK-NEXT: "a": on @d0 context 1 remaining 0,
  // CHECK-NEXT: "b": on @"d 1" context 2
  // CHECK-NEXT: ] : !pd.kv<2>
  %two = pd.resident ["a": on @d0 context 1 remaining 0, "b": on @"d 1" context 2]
}

// What the strategy said, of waves and of residents.
// CHECK-LABEL: pd.graph @decisions
pd.graph @decisions {
  %w = pd.requests ["a": prompt 1, "b": prompt 2, "c": prompt 3]
  // CHECK: %go = pd.decide %w [
  // CHECK-NEXT: "b": admit prefill_on @p0 decode_on @d0 chunk 64 because "first",
  // CHECK-NEXT: "a": admit rank 1,
  // CHECK-NEXT: "c": reject
  // CHECK-NEXT: ] : !pd.wave<3>
  // GENERIC: "pd.decide"(%w) {{.*}}verdict = #pd.column<0, 0, 2>{{.*}}> : (!pd.wave<3>) -> !pd.wave<3>
  %go = pd.decide %w [
    "b": admit rank 0 prefill_on @p0 decode_on @d0 chunk 64 because "first", "a": admit rank 1, "c": reject
  ] : !pd.wave<3>
  %r = pd.resident on @d0 ["x": context 1, "y": context 1, "z": context 1]
  // CHECK: pd.decide %r [
  // CHECK-NEXT: "x": swap,
  // CHECK-NEXT: "y": preempt,
  // CHECK-NEXT: "z": defer
  // CHECK-NEXT: ] : !pd.kv<3>
  %s = pd.decide %r ["x": swap, "y": preempt, "z": defer]
  // Who leaves is named with the reason.
  // CHECK: pd.leave [
  // CHECK-NEXT: "c": reject because "too long",
  // CHECK-NEXT: "d": defer
  // CHECK-NEXT: ]
  // GENERIC: "pd.leave"() <{ids = #pd.names<"c", "d">, verdict = #pd.column<2, 1>, because = #pd.words<"too long", "" : 0, 1>}> : () -> ()
  pd.leave ["c": reject because "too long", "d": defer]
  // Instances may compute by turns.
  // CHECK: pd.turns [
  // CHECK-NEXT: "d0": steps 40,
  // CHECK-NEXT: "d1": steps 0 because "the turn of d0"
  // CHECK-NEXT: ]
  // GENERIC: "pd.turns"() <{ids = #pd.names<"d0", "d1">, steps = #pd.column<40, 0>, because = #pd.words<"", "the turn of d0" : 0, 1>}> : () -> ()
  pd.turns ["d0": steps 40, "d1": because "the turn of d0" steps 0]
  // Who is preempted loses its KV, and its place in the value.
  // CHECK: %rest = pd.preempt %s [
  // CHECK-NEXT: "x": swap on @d0,
  // CHECK-NEXT: "y": preempt on @d0 because "no room"
  // CHECK-NEXT: ] : !pd.kv<3>
  // GENERIC: "pd.preempt"(%s) {{.*}} : (!pd.kv<3>) -> !pd.kv<1>
  %rest = pd.preempt %s ["x": swap on @d0, "y": preempt on @d0 because "no room"] : !pd.kv<3>
}

// Prompts are computed, in chunks where somebody says so.
// CHECK-LABEL: pd.graph @prefills
pd.graph @prefills {
  %w = pd.requests ["a": prompt 96, "b": prompt 128]
  // CHECK: %plain = pd.prefill %w : !pd.kv<2>
  // GENERIC: "pd.prefill"(%w) : (!pd.wave<2>) -> !pd.kv<2>
  %plain = pd.prefill %w
  // CHECK-NEXT: %full = pd.prefill %w chunk 64 on @p0 bounds {{\[\[0, 64, 96\], \[0, 64, 128\]\]}} : !pd.kv<2>
  // GENERIC: "pd.prefill"(%w) <{chunk = 64 : i64, bounds = #pd.lists<[0, 64, 96], [0, 64, 128]>, on = #pd.words<"p0" : 0, 0>}>
  %full = pd.prefill %w chunk 64 on @p0 bounds [[0, 64, 96], [0, 64, 128]] : !pd.kv<2>
  // CHECK-NEXT: %apart = pd.prefill %w on [@p0, @p1] : !pd.kv<2>
  %apart = pd.prefill %w on [@p0, @p1]
  // Two of the same are one.
  // CHECK-NEXT: %same = pd.prefill %w on @p0 : !pd.kv<2>
  %same = pd.prefill %w on [@p0, @p0]
  // CHECK-NEXT: %words = pd.prefill %w on [@p1, @p0] : !pd.kv<2>
  %words = pd.prefill %w on #pd.words<"p0", "p1" : 1, 0>
}

// KV is moved, joined and decoded.
// CHECK-LABEL: pd.graph @after_the_prompts
pd.graph @after_the_prompts {
  %w = pd.requests ["a": prompt 96, "b": prompt 128]
  %kv = pd.prefill %w on @p0
  // CHECK: %t = pd.transfer %kv source @p0 target @d0 [
  // CHECK-NEXT: "a": bytes 196608 us 40 via "g0 > nvs0 > g1"
  // CHECK-NEXT: ] : !pd.kv<2>
  // GENERIC: "pd.transfer"(%kv) {{.*}} : (!pd.kv<2>) -> !pd.kv<2>
  %t = pd.transfer %kv source @p0 target @d0 ["a": bytes 196608 us 40 via "g0 > nvs0 > g1"]
  // CHECK: pd.transfer %t source @p0 [
  // CHECK-NEXT: "a": target @d0,
  // CHECK-NEXT: "b": target @d1
  // CHECK-NEXT: ] : !pd.kv<2>
  %u = pd.transfer %t ["a": source @p0 target @d0, "b": source @p0 target @d1]
  %old = pd.resident on @d0 ["c": context 811]
  // CHECK: %all = pd.join %old, %u : !pd.kv<1>, !pd.kv<2>
  // GENERIC: "pd.join"(%old, %u) : (!pd.kv<1>, !pd.kv<2>) -> !pd.kv<3>
  %all = pd.join %old, %u
  // A join of nothing is an empty table.
  // CHECK-NEXT: %none = pd.join none
  // GENERIC: "pd.join"() : () -> !pd.kv<0>
  %none = pd.join none
  // CHECK-NEXT: %free = pd.decode %all : !pd.kv<3>
  // GENERIC: "pd.decode"(%all) : (!pd.kv<3>) -> !pd.kv<3>
  %free = pd.decode %all
  // CHECK-NEXT: %end = pd.decode %free steps 16 on [@d0, @d0, @d1] : !pd.kv<3>
  // GENERIC: "pd.decode"(%free) <{steps = 16 : i64, on = #pd.words<"d0", "d1" : 0, 0, 1>}>
  %end = pd.decode %free steps 16 on [@d0, @d0, @d1]
  // CHECK-NEXT: pd.yield %end, %none : !pd.kv<3>, !pd.kv<0>
  // GENERIC: "pd.yield"(%end, %none) : (!pd.kv<3>, !pd.kv<0>) -> ()
  pd.yield %end, %none
}

// The order of the text does not matter. Where a value stands below, its use says its type.
// CHECK-LABEL: pd.graph @order_does_not_matter
pd.graph @order_does_not_matter {
  // CHECK: pd.decode %kv : !pd.kv<1>
  %end = pd.decode %kv : !pd.kv<1>
  %kv = pd.prefill %w : !pd.kv<1>
  %w = pd.requests ["a": prompt 1]
  pd.yield %end
}

// A phase is a sub-graph with the resources that it needs.
// CHECK-LABEL: pd.graph @phases
pd.graph @phases {
  %w = pd.requests ["a": prompt 1]
  // CHECK: %kv = pd.phase prefill {compute_tokens = 1, kv_tokens = 2, kv_bytes = 512} {
  // CHECK-NEXT: %p = pd.prefill %w : !pd.kv<1>
  // CHECK-NEXT: pd.yield %p : !pd.kv<1>
  // CHECK-NEXT: } : !pd.kv<1>
  // GENERIC: "pd.phase"() <{phase = "prefill", compute_tokens = 1 : i64, kv_tokens = 2 : i64, kv_bytes = 512 : i64}> ({
  %kv = pd.phase prefill {compute_tokens = 1, kv_tokens = 2, kv_bytes = 512} {
    %p = pd.prefill %w
    pd.yield %p
  } : !pd.kv<1>
  // CHECK: pd.phase decode {
  // CHECK-NEXT: %{{.*}} = pd.decode %kv : !pd.kv<1>
  // CHECK-NEXT: pd.yield
  // CHECK-NEXT: }
  pd.phase decode {
    %d = pd.decode %kv
  }
}

// The steps of an instance: chunks of prompts, and rows that decode.
// CHECK-LABEL: pd.graph @steps
pd.graph @steps {
  %w = pd.requests ["a": prompt 600, "b": prompt 100]
  %kv = pd.prefill %w
  // CHECK: pd.steps @p0 of %kv {num_steps = 2, max_step_tokens = 512} [
  // CHECK-NEXT: "a": prompt 600 blocks 38,
  // CHECK-NEXT: "b": prompt 100 computed 10 cached 20 blocks 7 deadline 9 begin 1 until 102 source @p1 target @d0
  // CHECK-NEXT: ] chunks {
  // CHECK-NEXT: 0: "a" [0, 512);
  // CHECK-NEXT: 1: "a" [512, 600), "b" [30, 100);
  // CHECK-NEXT: } estimates {step_us = #pd.column<900, 300>, step_tokens = #pd.column<512, 159>, step_blocks = #pd.column<32, 45>} : !pd.kv<2>
  // GENERIC: "pd.steps"(%kv) <{instance = @p0, {{.*}}chunk_step = #pd.column<0, 1, 1>, chunk_row = #pd.column<0, 0, 1>, chunk_begin = #pd.column<0, 512, 30>, chunk_end = #pd.column<512, 600, 100>
  pd.steps @p0 of %kv {num_steps = 2, max_step_tokens = 512} [
    "a": prompt 600 blocks 38,
    "b": prompt 100 computed 10 cached 20 blocks 7 deadline 9 begin 1 until 102 source @p1 target @d0
  ] chunks {0: "a" [0, 512); 1: "a" [512, 600), "b" [30, 100)}
    estimates {step_us = #pd.column<900, 300>, step_tokens = #pd.column<512, 159>, step_blocks = #pd.column<32, 45>}
  // Steps of nothing.
  // CHECK: pd.steps @"d-0" {num_steps = 0, max_step_tokens = 1} []
  pd.steps @"d-0" {num_steps = 0, max_step_tokens = 1} []
  // Chunks as their columns.
  // CHECK: pd.steps @d1 {num_steps = 1, max_step_tokens = 8} [
  // CHECK-NEXT: "a": prompt 4 blocks 1
  // CHECK-NEXT: ] chunks {
  // CHECK-NEXT: 0: "a" [0, 4);
  // CHECK-NEXT: }
  pd.steps @d1 {num_steps = 1, max_step_tokens = 8} ["a": prompt 4 blocks 1] chunks {
    chunk_step = #pd.column<0>, chunk_row = #pd.column<0>, chunk_begin = #pd.column<0>, chunk_end = #pd.column<4>
  }
}

// Attributes that no op knows stay, on every op.
// CHECK-LABEL: pd.graph @attributes_stay
pd.graph @attributes_stay {
  // CHECK: ] : !pd.wave<1> attributes {note = 1 : i64}
  %w = pd.requests ["a": prompt 1] attributes {note = 1}
  // CHECK: pd.prefill %w : !pd.kv<1> attributes {note = 2 : i64}
  %kv = pd.prefill %w attributes {note = 2}
  // CHECK: pd.join none attributes {note = 3 : i64}
  %none = pd.join none attributes {note = 3}
  // CHECK: pd.steps @p0 {num_steps = 0, max_step_tokens = 1} [] attributes {note = 4 : i64}
  pd.steps @p0 {num_steps = 0, max_step_tokens = 1} [] attributes {note = 4}
  // CHECK: pd.yield %kv : !pd.kv<1> attributes {note = 5 : i64}
  pd.yield %kv attributes {note = 5}
  // CHECK: } attributes {note = 6 : i64}
} attributes {note = 6}
