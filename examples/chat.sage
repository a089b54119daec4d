// Answers and stories from the small model, on one machine split into an instance that computes
// prompts and one that writes outputs:  sagec run examples/chat.sage

model tiny from "models/tiny"

cluster laptop {
  device cpu kind cpu memory 4GiB
  instance p0 role prefill on cpu engine torch kv_blocks 256 block 16 budget 256
  instance d0 role decode on cpu engine torch kv_blocks 256 block 16 max_batch 16
}

// Outputs end at the end of the text, as the model sees it, or after `generate` tokens.
serve on laptop with fifo mode strict chunk 8 stop end-of-text {
  request "story" prompt "Once upon a time" generate 160 priority 1
  request "gardener" prompt "Once upon a time, there was a quiet gardener named Mara who lived in"
      generate 160 priority 1
  request "cache" prompt "Question: What is a KV cache?\nAnswer:" generate 64
  request "prefill" prompt "Question: What is prefill?\nAnswer:" generate 64
  request "decode" prompt "Question: Why is decode slow?\nAnswer:" generate 64 arrives 20ms
  request "baker" prompt "Question: What does a baker do?\nAnswer:" generate 64 arrives 20ms
  request "cold" prompt "Question: What is the opposite of cold?\nAnswer:" generate 16 arrives 50ms
}
