# Decides whether to build the CUDA kernels, with the nvcc that build_backend/imaml_cuda.py finds.
# Sets IMAML_HAS_CUDA, and enables the CUDA language for CMAKE_CUDA_ARCHITECTURES. Does not depend on
# the machine's GPU.
set(IMAML_HAS_CUDA OFF)
set(IMAML_LACKS_NVCC OFF CACHE INTERNAL "CUDA kernels were requested, but there is no nvcc; read by setup.py")
string(TOLOWER "${IMAML_CUDA}" _wanted)
if(NOT _wanted MATCHES "^(auto|on|off)$")
  message(FATAL_ERROR "imaml_ext: IMAML_CUDA must be auto, on or off, got '${IMAML_CUDA}'")
endif()

if(_wanted STREQUAL "on" OR (_wanted STREQUAL "auto" AND TORCH_cuda))
  execute_process(
    COMMAND "${Python_EXECUTABLE}" "${CMAKE_CURRENT_LIST_DIR}/../build_backend/imaml_cuda.py"
      "${TORCH_root}"
    OUTPUT_VARIABLE _found OUTPUT_STRIP_TRAILING_WHITESPACE COMMAND_ERROR_IS_FATAL ANY)
  if(_found)
    list(GET _found 0 _nvcc)
    list(GET _found 1 _libraries)
    set(ENV{CUDACXX} "${_nvcc}")
    if(_libraries)  # also for the checks of enable_language
      set(ENV{NVCC_APPEND_FLAGS} "$ENV{NVCC_APPEND_FLAGS} -L\"${_libraries}\"")
    endif()
    if(IMAML_CUDA_ARCHITECTURES)
      set(CMAKE_CUDA_ARCHITECTURES "${IMAML_CUDA_ARCHITECTURES}")
    elseif(NOT CMAKE_CUDA_ARCHITECTURES)
      # Machine code for every generation that nvcc supports, and PTX of the last one for newer GPUs.
      execute_process(COMMAND "${_nvcc}" --list-gpu-arch OUTPUT_VARIABLE _known)
      foreach(_architecture IN ITEMS 75 80 86 89 90 100 101 110 120)
        if(_known MATCHES "compute_${_architecture}[\n\r]")
          list(APPEND CMAKE_CUDA_ARCHITECTURES ${_architecture}-real)
          set(_last ${_architecture})
        endif()
      endforeach()
      if(_last)
        list(APPEND CMAKE_CUDA_ARCHITECTURES ${_last}-virtual)
      endif()
    endif()
    include(CheckLanguage)
    check_language(CUDA)
  endif()
  if(_nvcc AND CMAKE_CUDA_COMPILER)
    enable_language(CUDA)
    set(IMAML_HAS_CUDA ON)
    string(REGEX MATCH "^[0-9]+" _torch_major "${TORCH_cuda}")
    if(_torch_major AND NOT CMAKE_CUDA_COMPILER_VERSION MATCHES "^${_torch_major}\\.")
      message(WARNING "imaml_ext: building with nvcc ${CMAKE_CUDA_COMPILER_VERSION} for a torch with "
        "CUDA ${TORCH_cuda}: the driver must support both")
    endif()
  elseif(_wanted STREQUAL "on")
    message(FATAL_ERROR "imaml_ext: IMAML_CUDA=on, but there is no working nvcc: install the CUDA toolkit, "
      "or set CUDACXX or CUDA_HOME")
  else()
    set(IMAML_LACKS_NVCC ON CACHE INTERNAL "")
    message(WARNING "imaml_ext: torch has CUDA ${TORCH_cuda}, but there is no working nvcc: "
      "building for the CPU only")
  endif()
endif()
message(STATUS "imaml_ext: CUDA kernels: ${IMAML_HAS_CUDA} ${CMAKE_CUDA_ARCHITECTURES}")
