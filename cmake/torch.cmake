# Finds torch's headers and libraries without importing torch. Not with find_package(Torch), whose
# Caffe2Config requires a complete CUDA toolkit: the stable ABI needs only headers and libtorch.so.
find_package(Python 3.10 COMPONENTS Interpreter Development.Module REQUIRED)
execute_process(
  COMMAND "${Python_EXECUTABLE}" "${CMAKE_CURRENT_LIST_DIR}/torch_info.py" "${IMAML_TORCH_DIR}"
  OUTPUT_VARIABLE _info RESULT_VARIABLE _failed OUTPUT_STRIP_TRAILING_WHITESPACE)
if(_failed)
  message(FATAL_ERROR "imaml_ext: no torch found by ${Python_EXECUTABLE}; "
    "install torch>=${IMAML_TORCH_TARGET} or set IMAML_TORCH_DIR")
endif()
string(REPLACE "\n" ";" _info "${_info}")
foreach(_line IN LISTS _info)
  string(REGEX MATCH "^([a-z]+)=(.*)$" _ "${_line}")
  set(TORCH_${CMAKE_MATCH_1} "${CMAKE_MATCH_2}")
endforeach()
if(TORCH_version VERSION_LESS IMAML_TORCH_TARGET)
  message(FATAL_ERROR "imaml_ext: torch>=${IMAML_TORCH_TARGET} is needed, found ${TORCH_version}")
endif()
# TORCH_TARGET_VERSION: major, minor and patch in one byte each, from the most significant one.
string(REPLACE "." ";" _target "${IMAML_TORCH_TARGET}")
list(GET _target 0 _major)
list(GET _target 1 _minor)
math(EXPR TORCH_target "(${_major} << 56) | (${_minor} << 48)" OUTPUT_FORMAT HEXADECIMAL)
message(STATUS "imaml_ext: torch ${TORCH_version} (CUDA: '${TORCH_cuda}'), for torch>=${IMAML_TORCH_TARGET}")
