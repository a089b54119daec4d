// RUN: sagec compile --emit ir --pipeline order %s | filecheck %s
// RUN: sagec fmt --stdout %s | filecheck %s --check-prefix FMT

model m { layers 4 hidden 256 heads 8 kv_heads 2 ffn 688 vocab 1024 }
cluster c { device d; instance i on d engine sim kv_blocks 64 }

// A rule a line, one way to write units, signs and calls; the words stay.
// FMT: strategy short {
// FMT-NEXT:   order by blocks(prompt_tokens - cached_tokens) desc, -priority
// FMT-NEXT:   admit while kv_free > 5% and not (running >= 8 or prompt_tokens > 64 tokens)
// FMT-NEXT:   prefill on min(prefill_time), max(kv_free)
// FMT-NEXT:   preempt max priority, latest when kv_free < 2%
// FMT-NEXT:   chunk 16
// FMT-NEXT: }
strategy short {
  order by blocks ( prompt_tokens-cached_tokens ) desc , - priority
  admit while kv_free>5 % and not(running >=8 or prompt_tokens > 64tokens)
  prefill on min (prefill_time), max(kv_free); preempt max priority, latest when kv_free < 2%
  chunk 16
}

// A strategy of sagec with other options has a setting a line.
// FMT: strategy calm from adaptive {
// FMT-NEXT:   dwell_ms 8s
// FMT-NEXT:   long_steps 48
// FMT-NEXT: }
strategy calm from adaptive { dwell_ms 8s long_steps 48 }

// The graph names the strategy that its file serves with.
// CHECK: pd.graph @serve {policy = "short", mode = "hybrid"} {
serve with short { request "a" tokens 4 generate 4 }
