// RUN: sagec opt --split-input-file --verify-diagnostics --parsing-diagnostics %s | filecheck %s

// CHECK: error: row "a" lacks 'tokens': leading tokens whose KV the prefix cache has
// CHECK: | %h = kv.match %w ["b": tokens 1, "a"]
// CHECK-NEXT: |                                  ^
%w = pd.requests ["a": prompt 4, "b": prompt 5]
%h = kv.match %w ["b": tokens 1, "a"]

// -----

// CHECK: error: kv.match: "a": tokens -1
// CHECK: 0 or more (leading tokens whose KV the prefix cache has)
%w = pd.requests ["a": prompt 4]
%h = kv.match %w ["a": tokens -1]

// -----

// CHECK: error: kv.match: 2 rows say something of !pd.wave<1>
// CHECK: there are 1
%w = pd.requests ["a": prompt 4]
%h = kv.match %w ["a": tokens 1, "b": tokens 1]

// -----

// CHECK: error: kv.match: request "a" is matched twice on @p0
// CHECK: once a place
%w = pd.requests ["a": prompt 4, "b": prompt 5]
%h = kv.match %w on @p0 ["a": tokens 1, "a": tokens 2]

// -----

// CHECK: error: kv.match: request "a" is matched twice
// CHECK: once a place
%w = pd.requests ["a": prompt 4, "b": prompt 5]
%h = kv.match %w ["a": tokens 1, "b": tokens 1 on @p0, "a": tokens 2]

// -----

// A match takes a wave, and gives what it takes.
// CHECK: error: operand 'wave' at position 0 does not verify: !pd.kv<1> should be of base attribute pd.wave
%r = pd.resident on @d0 ["a": context 4]
%h = kv.match %r ["a": tokens 1]

// -----

// CHECK: error: kv.match: of !pd.wave<1> it gives !pd.wave<1>, not !pd.wave<2>
%w = pd.requests ["a": prompt 4]
%h = "kv.match"(%w) <{ids = #pd.names<"a">, tokens = #pd.column<1>}> : (!pd.wave<1>) -> !pd.wave<2>

// -----

// CHECK: error: kv.reserve: "a": blocks 0
// CHECK: 1 or more (how many, for the whole horizon)
kv.reserve on @d0 ["a": blocks 0]

// -----

// CHECK: error: expected 'on @...' or '[' before the rows
kv.reserve @d0 ["a": blocks 1]

// -----

// CHECK: error: 'on' stands before the rows already
kv.reserve on @d0 ["a": blocks 1, "b": on @d1 blocks 1]

// -----

// CHECK: error: expected the blocks' hashes as #pd.column<...>
kv.evict @d0 [17, 42]

// -----

// CHECK: error: expected an instance, @name
kv.evict d0 #pd.column<17>

// -----

// CHECK: error: Expected one of 'device', 'disk', 'host' as the tier
kv.migrate @d0 #pd.column<17> from device to cloud

// -----

// CHECK: error: kv.migrate: no tier 'cloud'
// CHECK: one of: device, host, disk
"kv.migrate"() <{instance = @d0, hashes = #pd.column<17>, source = "device", target = "cloud"}> : () -> ()

// -----

// CHECK: error: kv.migrate: from host to host moves nothing
// CHECK: name two tiers
kv.migrate @d0 #pd.column<17> from host to host
