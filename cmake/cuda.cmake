# Decides about the CUDA kernels, with the nvcc that build_backend/imaml_cuda.py finds. Sets
# IMAML_HAS_CUDA and, with it, enables the CUDA language for CMAKE_CUDA_ARCHITECTURES. Whether this
# machine has a GPU plays no part.
set(IMAML_HAS_CUDA OFF)
set(IMAML_LACKS_NVCC OFF CACHE INTERNAL "Kernels were wanted, but there is no nvcc: for setup.py")
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
    if(_libraries)  # CMake learns here where to link from, and its checks need it too
      set(ENV{NVCC_APPEND_FLAGS} "$ENV{NVCC_APPEND_FLAGS} -L\"${_libraries}\"")
    endif()
    if(IMAML_CUDA_ARCHITECTURES)
      set(CMAKE_CUDA_ARCHITECTURES "${IMAML_CUDA_ARCHITECTURES}")
    elseif(NOT CMAKE_CUDA_ARCHITECTURES)
      # One machine code per generation that this nvcc knows, and PTX of the last for what follows.
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
      message(WARNING "imaml_ext: nvcc ${CMAKE_CUDA_COMPILER_VERSION} builds for a torch with CUDA "
        "${TORCH_cuda}: the driver must know both")
    endif()
  elseif(_wanted STREQUAL "on")
    message(FATAL_ERROR "imaml_ext: IMAML_CUDA=on, but there is no working nvcc: install the CUDA toolkit, "
      "or set CUDACXX or CUDA_HOME")
  else()
    set(IMAML_LACKS_NVCC ON CACHE INTERNAL "")
    message(WARNING "imaml_ext: torch has CUDA ${TORCH_cuda}, but there is no working nvcc: "
      "building for the CPU alone")
  endif()
endif()
message(STATUS "imaml_ext: CUDA kernels: ${IMAML_HAS_CUDA} ${CMAKE_CUDA_ARCHITECTURES}")
