// What a launch may do before it has waited for the one before (programmatic dependent launch).
#pragma once

namespace igpt::emulator {

// A launch begins; `dependent`: it may while the one before runs, and that one while what it had not waited for does.
void begin_accesses(bool dependent);
// The running block's last thread ends: fails if the block has not waited, and the launch is a dependent one.
void end_accesses();

}  // namespace igpt::emulator
