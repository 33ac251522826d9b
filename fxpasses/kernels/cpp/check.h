// What the arguments of a call must be. interface.cpp turns what is thrown here into a message.

#pragma once

#include <stdexcept>
#include <string>

namespace {

[[noreturn]] void refuse(const std::string& message) { throw std::runtime_error(message); }

void require(bool holds, const char* wanted) {
  if (!holds) refuse(wanted);
}

}  // namespace
