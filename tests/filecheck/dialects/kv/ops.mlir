// RUN: sagec opt %s | sagec opt - | filecheck %s
// RUN: sagec opt --print-op-generic %s | sagec opt - | filecheck %s
// RUN: sagec opt --print-op-generic %s | filecheck %s --check-prefix=GENERIC

// What the prefix cache has of a wave; rows that are not named have nothing in it.
// CHECK-LABEL: pd.graph @what_the_prefix_cache_has
pd.graph @what_the_prefix_cache_has {
  %w = pd.requests ["a": prompt 1024, "b": prompt 96]
  // CHECK: %h = kv.match %w [
  // CHECK-NEXT: "a": tokens 512
  // CHECK-NEXT: ] : !pd.wave<2>
  // GENERIC: "kv.match"(%w) <{ids = #pd.names<"a">, tokens = #pd.column<512>}> : (!pd.wave<2>) -> !pd.wave<2>
  %h = kv.match %w ["a": tokens 512]
  // CHECK: kv.match %h [] : !pd.wave<2>
  %n = kv.match %h [] : !pd.wave<2>
}

// What single instances have: a row each, and the instance once where all rows have the same.
// CHECK-LABEL: pd.graph @what_single_instances_have
pd.graph @what_single_instances_have {
  %w = pd.requests ["a": prompt 1024, "b": prompt 96]
  // CHECK: %h = kv.match %w [
  // CHECK-NEXT: "a": tokens 512 on @p0,
  // CHECK-NEXT: "a": tokens 64 on @p1,
  // CHECK-NEXT: "b": tokens 32 on @p1,
  // CHECK-NEXT: "b": tokens 16
  // CHECK-NEXT: ] : !pd.wave<2>
  // GENERIC: "kv.match"(%w) <{ids = #pd.names<"a", "a", "b", "b">, tokens = #pd.column<512, 64, 32, 16>, on = #pd.words<"p0", "p1", "" : 0, 1, 1, 2>}>
  %h = kv.match %w ["a": tokens 512 on @p0, "a": tokens 64 on @p1, "b": tokens 32 on @p1, "b": tokens 16]
  // CHECK: kv.match %h on @p0 [
  // CHECK-NEXT: "b": tokens 48
  // CHECK-NEXT: ] : !pd.wave<2>
  %n = kv.match %h on @p0 ["b": tokens 48]
}

// Blocks that are kept free: the instance stands once where all rows have the same.
// CHECK-LABEL: pd.graph @blocks_are_reserved
pd.graph @blocks_are_reserved {
  // CHECK: kv.reserve on @d0 [
  // CHECK-NEXT: "a": blocks 21,
  // CHECK-NEXT: "b": blocks 1
  // CHECK-NEXT: ]
  // GENERIC: "kv.reserve"() <{ids = #pd.names<"a", "b">, on = #pd.words<"d0" : 0, 0>, blocks = #pd.column<21, 1>}> : () -> ()
  kv.reserve on @d0 ["a": blocks 21, "b": blocks 1]
  // CHECK: kv.reserve [
  // CHECK-NEXT: "c": on @d0 blocks 2,
  // CHECK-NEXT: "d": on @d1 blocks 3
  // CHECK-NEXT: ]
  kv.reserve ["c": on @d0 blocks 2, "d": on @d1 blocks 3]
}

// Cached blocks have no request any more; their hashes name them.
// CHECK-LABEL: pd.graph @cached_blocks_go_and_move
pd.graph @cached_blocks_go_and_move {
  // CHECK: kv.evict @d0 #pd.column<17, -42>
  // GENERIC: "kv.evict"() <{instance = @d0, hashes = #pd.column<17, -42>}> : () -> ()
  kv.evict @d0 #pd.column<17, -42>
  // CHECK-NEXT: kv.migrate @d0 #pd.column<17> from device to host
  // GENERIC: "kv.migrate"() <{instance = @d0, hashes = #pd.column<17>, source = "device", target = "host"}> : () -> ()
  kv.migrate @d0 #pd.column<17> from device to host
  // CHECK-NEXT: kv.migrate @"d-1" #pd.column<> from disk to device attributes {note = 1 : i64}
  kv.migrate @"d-1" #pd.column<> from disk to device attributes {note = 1}
}
