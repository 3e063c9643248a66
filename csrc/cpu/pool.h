// Threads of our own, where the compiler has no OpenMP (Apple's clang): there a second pool beside torch's.
#pragma once

namespace igpt::cpu {

// Calls work(context, index, count) in `wanted` threads at once, the caller's as index 0 among them; in fewer where the
// system gives no more, and in the caller's alone while another region runs. Nothing may throw.
void in_pool(int wanted, void (*work)(void* context, int index, int count), void* context);

}  // namespace igpt::cpu
